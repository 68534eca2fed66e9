"""The policy with the best evaluation is kept, for every checkpoint that a run may go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fdkernels.policy import PolicyError, load_policy
from tests.faults.harness import TINY
from train import play
from train.evaluate import evaluate
from train.member import Member
from train.outputs.best import best_file, best_files, keep_best, prune_best
from train.outputs.checkpoint import KEPT, steps_in
from train.run import main

FREQUENT = [*TINY, "--eval-every", "3"]


@pytest.fixture(scope="module")
def finished(datasets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best evaluation is in the middle."""
    out = tmp_path_factory.mktemp("best") / "run"

    def worse_at_the_end(*args: Any, episodes: int, **options: Any) -> Any:
        played = evaluate(*args, episodes=episodes, **options)
        worse = 1e3 if episodes == 2 else 0.0  # as many as the last one plays; the others play five
        return {role: outcomes._replace(returns=outcomes.returns - worse) for role, outcomes in played.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.outputs.curve.draw_curve", lambda *args: None)
        patch.setattr("train.member.evaluate", worse_at_the_end)
        assert main([*FREQUENT, "--out", str(out)]) == 0
    return out


def test_it_is_the_best_of_the_summary(finished: Path) -> None:
    results = json.loads((finished / "result.json").read_text())["results"]
    best = results["policy"]["best"]
    assert best["step"] < results["policy"]["last"]["step"], "there is nothing to tell apart"
    assert best_file(finished) == finished / "checkpoints" / f"best-{best['step']:09d}.safetensors"
    policy = load_policy(best_file(finished))
    played = evaluate(policy.network, "Hopper-v5", policy.acting, episodes=best["episodes"], seed=1_000_000)["policy"]
    assert float(played.returns.mean()) == best["return_mean"]


def test_play_finds_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for options in ([], ["--best"]):
        assert play.main([str(finished), "--episodes", "2", *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1].replace(f" ({best_file(finished).name})", "")
    assert best_file(finished).name in printed[1]
    assert play.main([str(finished / "checkpoints"), "--best"]) == 2
    assert "has no best-*.safetensors: a run writes it when it evaluates" in capsys.readouterr().err


def folder_of(tmp_path: Path, *, steps: tuple[int, ...] = (), best: tuple[int, ...] = ()) -> Path:
    for kind, numbers in {"step": steps, "best": best}.items():
        for number in numbers:
            (tmp_path / f"{kind}-{number:09d}.safetensors").touch()
    return tmp_path


def test_each_checkpoint_has_the_one_that_was_best_then(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, steps=(20, 30, 40), best=(5, 12, 20, 22, 26, 44, 47))
    prune_best(folder)
    # at 20 the evaluation may have come before or after the checkpoint
    assert list(best_files(folder)) == [12, 20, 26, 47]
    keep_best(folder, evaluated=[5, 12, 20, 26, 30])
    assert list(best_files(folder)) == [12, 20, 26]


def test_without_checkpoints_one_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, best=(1, 2))
    prune_best(folder)
    assert list(best_files(folder)) == [2]
    keep_best(folder, evaluated=[])
    with pytest.raises(PolicyError, match=r"has no best-\*\.safetensors"):
        best_file(folder.parent)


def test_a_long_run_keeps_few(datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation after each second update, each better than the one before."""
    most = 0
    save = Member.save

    def noted(member: Member, step: int, seconds: float) -> None:
        nonlocal most
        save(member, step, seconds)
        most = max(most, len(best_files(member.config.checkpoints)))
        assert len(steps_in(member.config.checkpoints)) <= KEPT

    def better(self: object, step: int, played: object) -> object:
        rows = {"policy": {"step": step, "role": "policy", "score_mean": float(step), "return_mean": 0.0}}
        self.evaluations += rows.values()  # type: ignore[attr-defined]
        return rows

    monkeypatch.setattr(Member, "save", noted)
    monkeypatch.setattr("train.member.Result.add", better)
    monkeypatch.setattr("train.member.evaluate", lambda *args, **kwargs: {})
    monkeypatch.setattr("train.outputs.curve.draw_curve", lambda *args: None)
    monkeypatch.setattr("train.loop.evaluation_line", lambda *args: "")
    monkeypatch.setattr("train.loop.Run.finish", lambda run: ("", {}))
    assert main([*FREQUENT, "--eval-every", "2", "--steps", "100", "--out", str(tmp_path / "run")]) == 0
    assert KEPT < most <= 2 * KEPT + 1
    assert max(best_files(tmp_path / "run" / "checkpoints")) == 110
