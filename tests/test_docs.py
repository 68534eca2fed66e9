"""The documentation's promises: its code runs, its commands could be typed, its links lead somewhere, it builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fdkernels.policy
import fdkernels_ref
from benchmarks import summary
from tests import documents
from tests.documents import PAGES, ROOT, Block, blocks
from tools.docs import pages

NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "from fdkernels.policy import load_policy"): "needs a finished run; docs/policies.md runs its lines",
}
"""Blocks that no test runs, by page and first line, with the reason."""
LONG = {"docs/policies.md": "exports a policy in two formats: ten seconds"}
"""Pages whose code `make test` leaves out."""
INERT = {"text", "json", "toml", "yaml", "diff", "bibtex"}
"""Languages of blocks that are there to be read."""


def left_out(block: Block) -> bool:
    return (block.page, block.first) in NOT_RUN


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to work in, and PyTorch's settings as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    threads = torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.long(LONG[page]) if page in LONG else ())
        for page in PAGES
        if blocks(page, "python")
    ],
)
@pytest.mark.usefixtures("own_settings")
def test_code_runs(page: str) -> None:
    names = documents.run_python([block for block in blocks(page, "python") if not left_out(block)])
    if page == "README.md":
        assert names["displacement"].grad.isfinite().all()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh") or documents.inline_commands(page)])
def test_commands_could_be_typed(page: str) -> None:
    for block in blocks(page, "sh") + documents.inline_commands(page):
        if not left_out(block):
            documents.check_block(block)


def test_what_no_test_runs_is_still_there() -> None:
    every = [block for page in PAGES for block in blocks(page) + documents.inline_commands(page)]
    assert {(block.page, block.first) for block in every} >= NOT_RUN.keys()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_checked_or_only_to_be_read(page: str) -> None:
    """```python runs, ```sh is checked. Anything else could hide code from both."""
    odd = [f"{block.where}: {block.language or 'indented'}" for block in blocks(page)]
    allowed = {*INERT, "python", "sh"}
    assert not [where for where, block in zip(odd, blocks(page)) if block.language not in allowed], odd


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for target in documents.targets(page):
        assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_those_that_github_draws(page: str) -> None:
    """GitHub reads a backslash before punctuation as Markdown does, and refuses operatorname."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    formulas = re.findall(r"\$\$.+?\$\$|\$(?!\s)[^$\n]+(?<!\s)\$", text, re.DOTALL)
    assert [formula for formula in formulas if re.search(r"\\([^a-zA-Z]|operatorname)", formula)] == []


def test_the_readmes_folders_exist() -> None:
    folders = re.findall(r"^\| `([\w/]+/)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert folders
    assert all((ROOT / folder).is_dir() for folder in folders)


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "python train/nothing.py",
        "python train/run.py --env hopper-medium --no-such-option 3",
        "python train/run.py --env hopper-mediun",
        "python train/compare.py --env hopper-medium -- --no-such-option 3",
        "python -m fdkernels.tune --rows many",
        "torchrun --no-such-option train/run.py",
        "torchrun train/run.py --env hopper-medium --no-such-option 3",
        "pip install -e '.[no-such-extra]'",
        "pytest tests/test_nothing.py",
        "for x in 1; do python train/play.py; done",
        "no-such-program",
        "python 'unclosed",
    ],
)
def test_wrong_commands_are_noticed(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        documents.check_block(Block("page", 1, "sh", command))


def test_tables_are_those_of_the_results() -> None:
    page = ROOT / "docs" / "performance.md"
    assert summary.filled(page.read_text(), summary.committed()) == page.read_text(), (
        "run `python benchmarks/summary.py docs/performance.md`"
    )


def table_of(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with this one, by lines; without the first of the head."""
    _, found, rest = (ROOT / page).read_text().partition(f"| {first} |")
    assert found, f"{page} has no table {first!r}"
    head, _, *lines = rest.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.removesuffix("|").lstrip("|").split("|")] for line in [head, *lines]]


def test_the_science_pages_table_is_that_of_all_metrics() -> None:
    """The means after 4,000 and 30,000 updates; one where they are the same."""
    columns, *lines = table_of("docs/science/README.md", "after 4,000 / 30,000 updates")
    head, *rows = table_of("docs/science/gain.md", "metric")
    every = {label: dict(zip(head, cells)) for label, *cells in rows}
    for label, *cells in lines:
        for column, cell in zip(columns, cells, strict=True):
            both = [name for name in head if name.endswith((f"{column}, 4k", f"{column}, 30k"))]
            means = [every[label][name].partition(" (")[0] for name in both]
            assert len(means) == 2
            assert " / ".join(dict.fromkeys(means)) == cell, f"{label}, {column}"


PROGRAMS = sorted(
    program
    for page in (ROOT / "docs" / "commands").glob("*.md")
    for program in re.findall(r"^<!-- options: (.+) -->$", page.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tables_have_every_option_of_the_help(program: str) -> None:
    text = pages.help_of(program)
    rows = [option for group in pages.options_of(text) for option, _ in group.rows]
    listed = set(re.findall(r"--[\w-]+", " ".join(rows)))
    begins_a_line = re.findall(r"^[│ ]{0,2}(?:-h, )?(--[a-z][\w-]+)", text, re.MULTILINE)
    assert len(begins_a_line) > 1
    assert set(begins_a_line) <= listed
    assert all(meaning for group in pages.options_of(text) for _, meaning in group.rows)


def test_links_lead_to_pages_of_the_site() -> None:
    text = (
        "[a](../machines.md#x) [`b`](../../README.md) [c](../../train/run.py) ![d](../compare.png) [e](no.md) `[f](g)`"
    )
    found = pages.with_site_links(text, "docs/science/README.md")
    assert found == "[a](../machines.md#x) [`b`](../readme.md) c ![d](../compare.png) [e](no.md) `[f](g)`"


@pytest.mark.parametrize("package", [fdkernels, fdkernels.policy, fdkernels_ref], ids=lambda package: package.__name__)
def test_the_api_pages_have_every_public_name(package: ModuleType) -> None:
    page = (ROOT / "docs" / "api" / f"{package.__name__.removeprefix('fdkernels.')}.md").read_text()
    directives = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert [name for name in package.__all__ if f"{package.__name__}.{name}" not in directives] == []


@pytest.mark.long("ten seconds; `make docs` does the same")
def test_the_site_builds_and_asks_no_other_server(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        html = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", html)
        assert loaded == [], page
        assert "arithmatex" not in html, f"{page}: a formula was not drawn"
        assert "&lt;!-- help" not in html
    assert "--num-seeds" in (tmp_path / "commands" / "run.html").read_text()
    assert "<mfrac>" in (tmp_path / "concepts.html").read_text()
