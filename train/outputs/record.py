"""The files that a run appends to: metrics.csv, evaluations.csv and TensorBoard events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from train.outputs.files import write_whole

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
        path = folder / "metrics.csv"
        before = [row for row in read_table(path) if int(row["step"]) <= step] if path.exists() else []
        self.metrics = Table(path, ("step", "stage", "updates_per_second", *metrics), before)
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
