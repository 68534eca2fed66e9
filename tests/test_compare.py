"""Several agents and seeds side by side: pictures and tables match the runs, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from train import compare
from train.compare import Line
from train.exits import Exit
from train.outputs import curve
from train.outputs.console import Ending


def summary(agent: str, seed: int, policy: float, sample: float, flow: float) -> dict[str, Any]:
    """The parts of a run's result.json that are read."""
    scores = {"policy": policy, "sample": sample, "flow": flow}
    return {
        "config": {"seed": seed, "eval_episodes": 20},
        "env_id": "HalfCheetah-v5",
        "label": "score",
        "role_names": {"policy": f"{agent}, mean-flow-of-16", "sample": f"{agent}, one sample", "flow": "the flow"},
        "dataset_score": 65.0,
        "seconds": 600.0 + seed,
        "results": {role: {"last": {"score_mean": score}} for role, score in scores.items()},
    }


def test_lines_and_table() -> None:
    results = {
        "fidec": [summary("fidec", 0, 85, 50, 44), summary("fidec", 1, 87, 54, 46)],
        "fql": [summary("fql", 0, 80, 60, 45)],
    }
    lines = compare.lines_of(results)
    assert [(line.name, line.scores) for line in lines] == [
        ("FiDec, mean-flow-of-16", [85, 87]),
        ("FiDec, one sample", [50, 54]),
        ("FQL, mean-flow-of-16", [80]),
        ("FQL, one sample", [60]),
        ("behaviour cloning (FiDec's flow alone)", [44, 46]),
    ]
    assert lines[0].middle == (86.0, (85.0, 87.0))
    assert lines[2].middle == (80, (80, 80))
    rows = compare.table(lines, results, "halfcheetah-medium-expert").splitlines()
    assert rows[0] == "| halfcheetah-medium-expert | seed 0 | seed 1 | all |"
    assert rows[2] == "| FiDec, mean-flow-of-16 | 85.0 | 87.0 | 86.0 (85.0 to 87.0) |"
    assert rows[4] == "| FQL, mean-flow-of-16 | 80.0 |  | 80.0 (80.0 to 80.0) |"
    assert all(row.count("|") == 5 for row in rows[:7])
    assert "65.0. Minutes of the longest run: FiDec 10, FQL 10." in rows[-1]


def test_the_picture_shows_every_middle(tmp_path: Path) -> None:
    lines = [Line("a", [10.0, 20.0]), Line("b", [80.0, 90.0])]
    bars = {line.name: (*line.middle, line.scores) for line in lines}
    curve.draw_comparison(tmp_path / "compare.png", "title", bars, 50.0, "score")
    picture = plt.imread(tmp_path / "compare.png")
    blue = np.abs(picture[..., :3] - mpl.colors.to_rgb(curve.BLUE)).max(-1) < 0.02
    rows, columns = np.nonzero(blue)
    upper = rows < (rows.min() + rows.max()) / 2
    assert columns[upper].max() < columns[~upper].min() - 0.4 * picture.shape[1], "15 is far to the left of 85"


@pytest.mark.usefixtures("datasets")
def test_runs_go_on_where_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = (  # noqa: SIM905 (reads as typed)
        "--actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 --batch-size 32 --flow-warmup 4 --critic-warmup 4 "
        "--steps 4 --log-every 2 --eval-every 4 --eval-episodes 2 --interim-episodes 1 --device cpu --dataset-size 5"
    ).split()
    options = ["--env", "hopper-medium", "--preset", "quick", "--agents", "fidec", "fql", "--out", str(tmp_path)]
    assert compare.main([*options, "--seeds", "0", "--", *tiny]) == 0
    assert "| FQL, one sample |" in capsys.readouterr().out

    def checkpoints() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-seed0/checkpoints/*.safetensors")}

    before = checkpoints()
    assert len(before) >= 2
    assert compare.main([*options, "--seeds", "0", "1", "--", *tiny]) == 0
    assert checkpoints() == before, "trained again"
    found = [json.loads((tmp_path / f"fidec-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
    scores = [result["results"]["policy"]["last"]["score_mean"] for result in found]
    table = (tmp_path / "compare.md").read_text()
    assert f"| FiDec, mean-flow-of-16 | {scores[0]:.1f} | {scores[1]:.1f} |" in table
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "fidec-seed0" / "evaluations.csv").read_text().splitlines()) == 1 + 3 * 3
    assert compare.main([*options, "--seeds", "0", "--", *tiny, "--lr", "0.1"]) == 2
    assert "was started with --lr" in capsys.readouterr().err
    for bad in (["--agent", "fql"], ["--num-seeds", "2"], ["--out", "elsewhere/fidec-seed0"], ["--json"], ["--quiet"]):
        assert compare.main([*options, "--seeds", "0", "--", *bad]) == 2
        assert "behind -- there can be no" in capsys.readouterr().err
    for bad in (["--seeds", "0", "0"], ["--seeds"]):
        with pytest.raises(SystemExit):
            compare.main([*options, *bad])
        assert "--seeds must be one or more, each once" in capsys.readouterr().err


def test_errors_of_its_runs_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, message in (
        (["--bogus", "3"], "an option behind -- is unknown or has a bad value; stderr says before this which one"),
        (["--device", "meta"], "--device must be auto, cpu or cuda, got meta"),
    ):
        asked = ["--env", "hopper-medium", "--out", str(tmp_path), "--json"]
        assert compare.main([*asked, "--", *bad]) == 2
        out, err = capsys.readouterr()
        assert json.loads(out) == {"error": message, "exit_code": 2}
        assert err.endswith(f"error: {message}\n")
        assert bad[0] in err
    assert not list(tmp_path.iterdir())


def test_a_stop_of_a_run_is_told_quietly_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Ending("", {"error": "stopped", "step": 1234}, Exit.STOPPED)
    monkeypatch.setattr(compare.run, "train", lambda config: stopped)
    asked = ["--env", "hopper-medium", "--out", str(tmp_path), "--seeds", "3"]
    message = f"stopped at step 1,234 of {tmp_path / 'fidec-seed3'}; the same command goes on"
    assert compare.main([*asked, "--quiet"]) == 130
    assert capsys.readouterr() == ("", f"{message}\n")
    assert compare.main([*asked, "--json"]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": message, "exit_code": 130}
    assert err.endswith(f"{message}\n")
