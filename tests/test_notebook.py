"""The tour in examples/tour.ipynb: its committed outputs are whole, and it runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"
LARGEST = 300_000
"""Bytes, so that the repository stays small when outputs are committed again and again."""


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outline(notebook: NotebookNode) -> list[tuple[str, int]]:
    """For each cell with code: what it printed, without the digits, and how many pictures it showed."""
    return [
        (
            re.sub(r"\d+", "0", "".join(output.get("text", "") for output in cell.outputs)),
            sum("image/png" in output.get("data", {}) for output in cell.outputs),
        )
        for cell in code_of(notebook)
    ]


def test_its_committed_outputs_are_whole() -> None:
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    assert TOUR.stat().st_size < LARGEST
    assert [cell.execution_count for cell in code_of(tour)] == list(range(1, len(code_of(tour)) + 1))
    assert sum(pictures for _, pictures in outline(tour)) == 2


@pytest.mark.long("trains a flow and six displacements: a minute")
def test_it_runs_and_prints_what_is_committed(tmp_path: Path) -> None:
    """It has checks of its own; its numbers depend on the processor."""
    tour = nbformat.read(TOUR, as_version=4)
    committed = outline(tour)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(tour, timeout=1200, resources=resources).execute()
    assert outline(tour) == committed
