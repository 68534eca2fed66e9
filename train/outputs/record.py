"""The files that a run appends to: metrics.csv, evaluations.csv and TensorBoard events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from train.outputs.files import write_whole
from train.reading import require_file
from train.settings import RunError

LARGEST_TABLE = 256 << 20
"""Bytes of a table that a resumed run goes on with."""
EVALUATION_COLUMNS = ("step", "role", "return_mean", "return_sem", "score_mean", "score_sem", "episodes")


class Table:
    """A CSV file that starts with ``rows``; each further row is written to disk at once."""

    def __init__(self, path: Path, columns: tuple[str, ...], rows: Sequence[Mapping[str, object]]) -> None:
        beginning = io.StringIO(newline="")
        writer = csv.DictWriter(beginning, columns, restval="")
        writer.writeheader()
        writer.writerows(map(_formatted, rows))
        write_whole(path, beginning.getvalue())
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="")

    def add(self, row: Mapping[str, object]) -> None:
        self._writer.writerow(_formatted(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _formatted(row: Mapping[str, object]) -> dict[str, object]:
    return {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a `Table`, without a last row that a killed process left incomplete."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def earlier_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table of metrics that another process has left.

    Raises:
        RunError: it is not one.
    """
    try:
        if (size := require_file(path)) > LARGEST_TABLE:
            raise ValueError(f"it has {size:,} bytes")
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
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add_metrics(self, step: int, stage: str, updates_per_second: float, figures: Mapping[str, float]) -> None:
        self.metrics.add({"step": step, "stage": stage, "updates_per_second": updates_per_second, **figures})
        for name, value in {**figures, "updates_per_second": updates_per_second}.items():
            self.events.add_scalar(f"train/{name}", value, step)

    def add_evaluation(self, row: Mapping[str, object]) -> None:
        self.evaluations.add(row)
        for name in ("return_mean", "score_mean"):
            self.events.add_scalar(f"evaluation/{row['role']}_{name}", row[name], row["step"])
        self.events.flush()

    def close(self) -> None:
        self.metrics.close()
        self.evaluations.close()
        self.events.close()
