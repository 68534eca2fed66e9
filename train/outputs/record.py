"""The files that a run appends to: metrics.csv, evaluations.csv and TensorBoard events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdkernels.policy.untrusted import require_file
from train.outputs.events import Events
from train.outputs.files import GrowingFile
from train.settings import RunError

LARGEST_TABLE = 256 << 20
"""Bytes of a table that is read."""
EVALUATION_COLUMNS = ("step", "role", "return_mean", "return_sem", "score_mean", "score_sem", "episodes")


class Table:
    """A CSV file that starts with ``rows``; each further row is written to disk at once."""

    def __init__(self, path: Path, columns: tuple[str, ...], rows: Sequence[Mapping[str, object]]) -> None:
        self._columns = columns
        header = dict(zip(columns, columns))
        self._file = GrowingFile(path, b"".join(map(self._line, (header, *rows))))

    def add(self, row: Mapping[str, object]) -> None:
        self._file.add(self._line(row))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _line(self, row: Mapping[str, object]) -> bytes:
        line = io.StringIO(newline="")
        csv.DictWriter(line, self._columns, restval="").writerow(_formatted(row))
        return line.getvalue().encode()


def _formatted(row: Mapping[str, object]) -> dict[str, object]:
    return {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a `Table`, without a last row that a killed process left incomplete.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no file, too large, or not text.
    """
    if (size := require_file(path)) > LARGEST_TABLE:
        raise ValueError(f"{path} has {size:,} bytes")
    # zeros are what a power cut may leave of rows that were not yet on the disk
    whole, _, _ = path.read_bytes().partition(b"\0")[0].rpartition(b"\n")
    return [row for row in csv.DictReader(whole.decode().splitlines()) if None not in row.values()]


def earlier_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table of metrics that another process has left.

    Raises:
        RunError: it is not one.
    """
    try:
        rows = read_table(path)
        for i, row in enumerate(rows):
            if unknown := [name for name in row if name not in columns]:
                raise ValueError(f"row {i} has a column {unknown[0]!r:.100}")
            int(row["step"])
            for name in columns:
                if name != "stage":
                    float(row.get(name) or 0)
    except (csv.Error, ValueError, KeyError) as error:
        raise RunError(
            f"{path} is no table of a run's metrics ({type(error).__name__}: {error}); without it, --resume begins a "
            "new one"
        ) from error
    return rows


class Record:
    """The tables and TensorBoard events of one run, from ``step`` on.

    Args:
        folder: the run's folder.
        step: updates made so far; later rows, left by a killed run, are dropped.
        evaluations: rows of the evaluations so far.
        metrics: names of the figures.
    """

    def __init__(
        self, folder: Path, step: int, evaluations: Sequence[Mapping[str, object]], metrics: tuple[str, ...]
    ) -> None:
        path, columns = folder / "metrics.csv", ("step", "stage", "updates_per_second", *metrics)
        before = [row for row in earlier_rows(path, columns) if int(row["step"]) <= step] if path.exists() else []
        self.metrics = Table(path, columns, before)
        self.evaluations = Table(folder / "evaluations.csv", EVALUATION_COLUMNS, evaluations)
        logged = {int(row["step"]) for row in before}
        evaluated = {(tag, row["step"]) for row in evaluations for tag in _evaluation_scalars(row)}

        def is_in_a_table(tag: str, at: int) -> bool:
            return (tag.startswith("train/") and at in logged) or (tag, at) in evaluated

        self.events = Events(folder / "tensorboard", keep=is_in_a_table)
        self._files = (self.metrics, self.evaluations, self.events)

    def add_metrics(self, step: int, stage: str, updates_per_second: float, figures: Mapping[str, float]) -> None:
        row = {"updates_per_second": updates_per_second, **figures}
        self.metrics.add({"step": step, "stage": stage, **row})
        self.events.add(step, {f"train/{name}": value for name, value in row.items()})

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        self.evaluations.add(row)
        self.events.add(row["step"], _evaluation_scalars(row))

    def sync(self) -> None:
        """Put everything safely on disk. What a checkpoint accounts for must be there before it."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _evaluation_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    return {f"evaluation/{row['role']}_{name}": row[name] for name in ("return_mean", "score_mean")}
