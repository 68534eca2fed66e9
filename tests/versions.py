"""Run the library's tests under PyTorch from the oldest supported version to the newest: ``make test-versions``.

    python tests/versions.py [2.7 2.9 2.11 newest]

Each PyTorch gets its own virtual environment under runs/versions, with the Triton that belongs to it. The oldest runs
with the oldest Python and NumPy, if there is a ``python3.10`` or OLDEST_PYTHON names one. This downloads 15 GB,
takes a quarter of an hour on two cores once the environments are there, and writes its results to docs/versions.md.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "versions"
TABLE = ROOT / "docs" / "versions.md"
VERSIONS = ("2.7", "2.9", "2.11", "newest")
OLDEST_PYTHON = os.environ.get("OLDEST_PYTHON", "python3.10")
# before Triton 3.7 the interpreter does not work with NumPy 2.4
NUMPY = {"2.7": "numpy==1.26.*", "newest": "numpy"}
NEEDS = ("einops", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "setuptools")
NAMES = ("backend", "chain", "flow", "general_path", "networks", "operators", "philox", "pullback", "reference")
CPU = [f"tests/test_{name}.py" for name in NAMES]
GROUPS = {
    "CPU": [*CPU, "fdkernels", "-k", "not compile"],
    "torch.compile": [*CPU, "-k", "compile"],
    "interpreter": ["tests/kernels"],
    "ahead of time": ["tests/tools/test_runtime.py", "tests/tools/test_static_report.py", "tests/test_table.py"],
}
ASKED = """
import json, platform, numpy, torch, triton
print(json.dumps({"PyTorch": torch.__version__.partition("+")[0], "Triton": triton.__version__,
    "Python": platform.python_version(), "NumPy": numpy.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}))
"""
HEAD = """# Versions

What `make test-versions` found on {date} ({where}).
Tests passed, failed and skipped. CPU: the library without a GPU, and under `torch.compile`. Interpreter: its kernels in
Triton's interpreter. Ahead of time: the kernels compiled for sm_80 and sm_90 by that Triton. What needs a GPU is
skipped.

"""
NOTES = """
The same tests pass everywhere; speed may differ. Tiles were chosen with Triton 3.7: on sm_90 the largest spill up to
32 bytes of registers with 3.5 and 3.6, and up to 216 with 3.3 (2 kB in rows of 1,024 bfloat16). Triton 3.3 fails on a
gather that the penalty's kernels use, so with it rows whose size 16 bytes do not divide are read number by number. The
interpreter of Triton before 3.7 needs NumPy before 2.4.
"""


def works(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def install(version: str) -> Path:
    """The Python of an environment with that PyTorch, which is created if it is missing."""
    folder = FOLDER / version
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        base = OLDEST_PYTHON if version == VERSIONS[0] and works(OLDEST_PYTHON) else sys.executable
        torch = "torch" if version == "newest" else f"torch=={version}.*"
        subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", torch, NUMPY.get(version, "numpy<2.4"), *NEEDS], check=True
        )
        (folder / "installed").touch()
    return python


def run(python: Path, version: str, group: str) -> str:
    """Run the tests of a group; returns the counts for the table."""
    report = FOLDER / f"{version}-{group.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(FOLDER / version / "triton")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(FOLDER / version / "inductor")}
    if group == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    command += ["--hypothesis-profile", "quick"]
    subprocess.run([*command, f"--junitxml={report}", *GROUPS[group]], cwd=ROOT, env=environment)
    if not report.exists():
        return "did not start"
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    counts = {"passed": tests - skipped - failed, "**failed**": failed, "skipped": skipped}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def main(versions: list[str]) -> int:
    rows = []
    for version in versions:
        python = install(version)
        asked = subprocess.run([python, "-c", ASKED], check=True, capture_output=True, text=True)
        rows.append(json.loads(asked.stdout) | {group: run(python, version, group) for group in GROUPS})
    columns = ["PyTorch", "Triton", "Python", "NumPy", *GROUPS]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    where = f"commit {described.stdout.strip()}, {os.cpu_count()} cores with {rows[0]['cpu']}"
    head = HEAD.format(date=datetime.date.today(), where=where)
    TABLE.write_text(head + "".join("| " + " | ".join(line) + " |\n" for line in lines) + NOTES)
    print(TABLE.read_text())
    return int(any("fail" in row[group] or "start" in row[group] for row in rows for group in GROUPS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS)))
