"""The tables and events of a run that goes on: each number once, whatever the killed process left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from train.outputs.events import read_events
from train.outputs.record import Record, read_table


def evaluation(step: int, score: float) -> dict[str, Any]:
    numbers = {"return_mean": 10 * score, "return_sem": 0.0, "score_mean": score, "score_sem": 0.0, "episodes": 2}
    return {"step": step, "role": "policy", **numbers}


def record(folder: Path, step: int, evaluations: Sequence[dict[str, Any]] = ()) -> Record:
    return Record(folder, step, evaluations, ("loss",))


def written(folder: Path) -> Record:
    """A record of 30 updates with an evaluation after 20, still open."""
    folder.mkdir()
    found = record(folder, 0)
    for step in (10, 20, 30):
        found.add_metrics(step, "fidec", 5.0, {"loss": step / 4})
        if step == 20:
            found.add_evaluation(evaluation(20, 50.0))
    return found


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard itself shows."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    return [(scalar.step, scalar.value) for scalar in accumulator.Scalars(tag)]


def times(folder: Path) -> dict[tuple[str, int], float]:
    """The time of each scalar, which must not be there twice."""
    found: dict[tuple[str, int], float] = {}
    for path in (folder / "tensorboard").iterdir():
        for event in read_events(path):
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = event.wall_time
    return found


def test_all_is_on_the_disk_without_closing(tmp_path: Path) -> None:
    written(tmp_path / "run")
    assert [row["step"] for row in read_table(tmp_path / "run" / "metrics.csv")] == ["10", "20", "30"]
    assert shown(tmp_path / "run", "train/loss") == [(10, 2.5), (20, 5.0), (30, 7.5)]
    assert shown(tmp_path / "run", "evaluation/policy_score_mean") == [(20, 50.0)]


@pytest.mark.parametrize("step", [0, 20, 25])
def test_what_comes_after_a_checkpoint_is_dropped_and_made_again(tmp_path: Path, step: int) -> None:
    """The evaluation after 20 may have been made before the checkpoint or after it."""
    folder = tmp_path / "run"
    written(folder).close()
    before = times(folder)
    made = [evaluation(20, 50.0)] if step == 25 else []
    resumed = record(folder, step, made)
    kept = [at for at in (10, 20, 30) if at <= step]
    assert [int(row["step"]) for row in read_table(folder / "metrics.csv")] == kept
    tags = [("train/loss", at) for at in kept] + [("train/updates_per_second", at) for at in kept]
    tags += [(f"evaluation/policy_{name}", 20) for name in ("score_mean", "return_mean") if made]
    assert times(folder) == {tag: before[tag] for tag in tags}
    if not made:
        resumed.add_evaluation(evaluation(20, 50.0))
    resumed.add_metrics(30, "fidec", 5.0, {"loss": 7.5})
    resumed.close()
    assert shown(folder, "train/loss") == [(at, at / 4) for at in (*kept, 30)]
    assert shown(folder, "evaluation/policy_score_mean") == [(20, 50.0)]


def test_a_kill_before_the_earlier_events_are_deleted_leaves_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    written(folder).close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: None)
        record(folder, 20, [evaluation(20, 50.0)])
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert shown(folder, "train/loss") == [(10, 2.5), (20, 5.0)]
    assert shown(folder, "evaluation/policy_score_mean") == [(20, 50.0)]
    record(folder, 20, [evaluation(20, 50.0)])
    assert len(times(folder)) == 6


def test_events_of_an_earlier_version_go_on(tmp_path: Path) -> None:
    """It left later events in place, and had TensorBoard hide them."""
    folder = tmp_path / "run"
    written(folder).close()
    for path in (folder / "tensorboard").iterdir():
        path.unlink()
    for purge, values in ((1, {10: 1.0, 20: 2.0}), (11, {20: 5.0, 30: 7.5})):
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        for step, value in values.items():
            writer.add_scalar("train/loss", value, step)
        writer.close()
    record(folder, 30).close()
    assert shown(folder, "train/loss") == [(10, 1.0), (20, 5.0), (30, 7.5)]
    assert len(times(folder)) == 3


def test_a_row_or_event_that_was_cut_anywhere_does_not_count(tmp_path: Path) -> None:
    written(tmp_path / "run").close()
    table, (events,) = tmp_path / "run" / "metrics.csv", (tmp_path / "run" / "tensorboard").iterdir()
    content, last = table.read_bytes(), len(table.read_bytes().splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        table.write_bytes(content[:-cut])
        assert [row["step"] for row in read_table(table)] == ["10", "20"], content[-last:-cut]
        table.write_bytes(content[:-cut] + bytes(cut))  # a power cut may leave zeros
        assert [row["step"] for row in read_table(table)] == ["10", "20"], content[-last:-cut]
    content, whole = events.read_bytes(), list(read_events(events))
    for cut in range(1, 60):
        events.write_bytes(content[:-cut])
        found = list(read_events(events))
        assert found == whole[: len(found)]
        assert len(whole) - 2 <= len(found) < len(whole)
