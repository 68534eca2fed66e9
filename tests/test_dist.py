"""The wheel and the source distribution: what is in them, and that the library works from the wheel alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fdkernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("fdkernels", "fdkernels_ref")
pytestmark = pytest.mark.long("builds the distributions and an environment: half a minute")


def run(*command: str | Path, **options: str | Path | dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, *kinds: str) -> Path:
    """Build with the installed backend, so that no network is needed."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    return next(dist.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def files_of(package: str) -> set[str]:
    paths = (ROOT / package).rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def with_their_own(requirements: list[str]) -> set[str]:
    """The names of required distributions, without extras, and of those that they require in turn."""
    found: set[str] = set()
    asked = list(requirements)
    while asked:
        requirement = Requirement(asked.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            asked += importlib.metadata.requires(name) or []
    return found


def test_an_index_accepts_them(wheel: Path, sdist: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)


def test_the_wheel_has_every_file_of_the_library_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set().union(*map(files_of, PACKAGES))
    assert "fdkernels/kernels/tuning/shipped.json" in names


def test_the_metadata(metadata: Message) -> None:
    assert metadata["Version"] == fdkernels.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    required = {Requirement(text).name for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert required == {"torch", "numpy", "einops", "triton"}


def test_the_description_leads_nowhere_relative(metadata: Message) -> None:
    """An index has none of the repository's other files."""
    description = metadata.get_payload()
    assert isinstance(description, str)
    assert description.startswith("# fdkernels")
    assert "## In your own agent" in description
    assert re.findall(r"\]\((?!https?:)[^)]*\)", description) == []


def test_the_source_distribution_is_the_checkout(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    assert names - {"PKG-INFO"} == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} - {".venv"}


def test_builds_are_reproducible(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """The wheel of the checkout is that of the source distribution, bit for bit; so is another source distribution."""
    again = build(ROOT, tmp_path, "--wheel", "--sdist")
    for file in (wheel, sdist):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_library_works_from_the_wheel_alone(wheel: Path, metadata: Message, tmp_path: Path) -> None:
    """In a new environment that has the wheel, and links to those installed packages that it requires."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in with_their_own(metadata.get_all("Requires-Dist", [])):
        for file in importlib.metadata.files(name) or []:
            top = packages / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top.name)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    run(*pip, "check")
    listed = run(*pip, "list", "--format=freeze").lower()
    assert "fdkernels==" in listed
    assert "gymnasium" not in listed  # nor anything else of the training extra
    for interpret in ("0", "1"):
        environment = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
        out = run(python, "-I", ROOT / "tests" / "smoke.py", cwd=tmp_path, env=environment)
        assert f"fdkernels {fdkernels.__version__}" in out
