"""What a run leaves behind: metrics.csv, evaluations.csv and TensorBoard events."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from train.agents import METRICS

METRIC_COLUMNS = ("step", "stage", "updates_per_second", *METRICS)
EVALUATION_COLUMNS = ("step", "role", "return_mean", "return_sem", "score_mean", "score_sem", "episodes")


class Table:
    """A CSV file, one row per call, on disk at once. Rows after ``step`` (of a run that is resumed there) go."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        kept = [row for row in read_table(path) if int(row["step"]) <= step] if path.exists() else []
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="")
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()

    def add(self, row: Mapping[str, object]) -> None:
        self._writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Record:
    """The tables and the TensorBoard events of one run, from ``step`` on."""

    def __init__(self, folder: Path, step: int) -> None:
        self.metrics = Table(folder / "metrics.csv", METRIC_COLUMNS, step)
        self.evaluations = Table(folder / "evaluations.csv", EVALUATION_COLUMNS, step)
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
