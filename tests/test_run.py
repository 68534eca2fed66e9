"""The training command, on real data and the real simulator, with tiny networks."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fdkernels
import train.run
from tests.waiting import PATIENCE, wait_for_checkpoint
from train.agents import AGENTS
from train.agents.base import METRICS
from train.agents.hyperparameters import AgentConfig
from train.data.load import load_dataset
from train.data.synthetic import random_dataset
from train.environments import ENVIRONMENTS, resolve
from train.evaluate import ROLES, run_episodes
from train.loop import Run
from train.outputs import curve, statistics
from train.presets import preset_config
from train.run import main, parse
from train.settings import RunError

pytestmark = pytest.mark.usefixtures("datasets")
REPOSITORY = Path(__file__).parents[1]
TINY = (  # noqa: SIM905 (reads as typed)
    "--env hopper-medium --dataset-size 5 --actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 --batch-size 32 "
    "--flow-warmup 6 --critic-warmup 4 --steps 20 --log-every 5 --eval-every 10 --eval-episodes 2 --checkpoint-every 5 "
    "--preset quick --device cpu --no-anneal --freeze-flow-after None --freeze-critic-after None"
).split()
"""Little data, and short episodes, because an untrained Hopper falls."""


def command(*args: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train" / "run.py"), *TINY, *args]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run from the shell, and its output."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = subprocess.run(command("--out", str(out)), capture_output=True, text=True, timeout=300, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_first_lines_say_what_is_trained_on_what(finished: tuple[Path, str]) -> None:
    out, printed = finished
    lines = printed.splitlines()
    assert lines[0] == "run        fidec on hopper-medium (Hopper-v5), seed 0, cpu"
    assert lines[1].startswith("preset     quick: 6 + 4 warm-up and 20 agent updates")
    assert lines[2] == "update     plain, no CUDA graphs on the CPU"
    data = [line for line in lines if line.startswith("data ")]
    assert any("mujoco/hopper/medium-v0" in line for line in data)
    assert any("fdkernels/hopper/medium-5ep-v0" in line and re.search(r" \d,\d+ transitions", line) for line in data)
    assert sorted(p.name for p in out.parent.iterdir()) == ["run"], "a run leaves files only in its own folder"


def test_what_a_run_leaves_behind(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    metrics, evaluations = read(out / "metrics.csv"), read(out / "evaluations.csv")
    assert [row["stage"] for row in metrics] == ["flow warm-up"] * 2 + ["critic warm-up"] + ["fidec"] * 4
    assert all(np.isfinite(float(metrics[-1][name])) for name in METRICS)
    assert [(row["step"], row["role"]) for row in evaluations] == [
        (step, role) for step in ("6", "16", "26", "30") for role in ROLES
    ]
    result = json.loads((out / "result.json").read_text())
    assert (result["fdkernels"], result["torch"]) == (fdkernels.__version__, torch.__version__)
    last = result["results"]["policy"]["last"]
    assert last["return_mean"] == pytest.approx(float(evaluations[-3]["return_mean"]), rel=1e-6)
    assert last["score_mean"] == pytest.approx(100 * (last["return_mean"] + 20.272305) / (3234.3 + 20.272305))
    table = printed[printed.index("D4RL-normalised score (Hopper-v5)") :]
    for text in ("fidec", "behaviour flow (δ = 0)", "dataset", "curve.png", f"{last['return_mean']:,.0f}"):
        assert text in table


LONGER = ["--steps", "400", "--eval-every", "400", "--log-every", "50", "--checkpoint-every", "10"]
"""Seconds between the first checkpoint and the end, in which it can be interrupted."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([*TINY, *LONGER, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.long("a run and a half, and SIGTERM ends it the same way")),
        signal.SIGTERM,
    ],
)
def test_an_interrupted_run_ends_where_it_would_have(straight: Path, tmp_path: Path, how: int) -> None:
    out, pipe = tmp_path / "run", subprocess.PIPE
    process = subprocess.Popen(command(*LONGER, "--out", str(out)), stdout=pipe, stderr=pipe, text=True)
    wait_for_checkpoint(out, process)
    process.send_signal(how)
    assert process.wait(timeout=PATIENCE) == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    process.communicate()

    assert main([*TINY, *LONGER, "--out", str(out), "--resume"]) == 0
    ours, theirs = load_file(out / "policy.safetensors"), load_file(straight / "policy.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (out / "evaluations.csv").read_text() == (straight / "evaluations.csv").read_text()
    numbers = [[{k: v for k, v in row.items() if k != "updates_per_second"} for row in read(p / "metrics.csv")]
               for p in (out, straight)]  # fmt: skip
    assert numbers[0] == numbers[1]


def test_a_finished_run_only_shows_its_table_again(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, printed = finished
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    again = capsys.readouterr().out
    assert (
        again.split("D4RL-normalised")[1].split("minutes")[0] == printed.split("D4RL-normalised")[1].split("minutes")[0]
    )


def test_overwrite_keeps_what_is_not_the_runs(tmp_path: Path) -> None:
    short = [*TINY, "--out", str(tmp_path / "run"), "--steps", "5"]
    assert main(short) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*short, "--overwrite"]) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in read(tmp_path / "run" / "evaluations.csv")] == [*["6"] * 3, *["15"] * 3]


def test_resume_refuses_other_data(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    load = train.run.load_dataset
    monkeypatch.setattr(
        train.run, "load_dataset", lambda *a, **k: dataclasses.replace(load(*a, **k), dataset_ids=("x",))
    )
    assert main([*TINY, "--out", str(out), "--resume"]) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_a_run_from_before_a_setting_existed_goes_on(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    config = json.loads((out / "config.json").read_text())
    del config["hyper"]["metric"]
    (out / "config.json").write_text(json.dumps(config))
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert main([*TINY, "--out", str(out), "--resume", "--metric", "pullback"]) == 2
    assert "was started with --metric score" in capsys.readouterr().err


def test_a_killed_writer_costs_a_row_not_the_table(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    table = out / "metrics.csv"
    table.write_text(table.read_text() + "30,fid")
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert table.read_text() == (finished[0] / "metrics.csv").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, _ = finished
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out), "--steps", "10"]) == 0
    newest = max(out.glob("checkpoints/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"refused    checkpoint {newest}" in printed
    assert "step-000000015.safetensors, step 15" in printed
    ours, theirs = load_file(out / "policy.safetensors"), load_file(straight / "policy.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_without_an_intact_checkpoint_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one whose checkpoints could not be read this time."""
    out = tmp_path / "run"
    assert main([*TINY, "--out", str(out), "--steps", "10"]) == 0
    with monkeypatch.context() as patch:
        error = OSError(errno.EIO, os.strerror(errno.EIO), "step")
        patch.setattr("train.outputs.checkpoint.load_file", lambda path: (_ for _ in ()).throw(error))
        before = contents(out)
        assert main([*TINY, "--out", str(out), "--resume"]) == 2
        assert "step: the disk failed to read or write it" in capsys.readouterr().err
        assert contents(out) == before
    for path in out.glob("checkpoints/step-*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(out)
    for _ in range(2):
        assert main([*TINY, "--out", str(out), "--resume"]) == 2
        assert f"no checkpoint in {out / 'checkpoints'} is intact; delete that folder" in capsys.readouterr().err
    assert contents(out) == before
    shutil.rmtree(out / "checkpoints")
    assert main([*TINY, "--steps", "1", "--out", str(out), "--resume"]) == 0


@pytest.mark.long("plays a hundred episodes, and evaluates long ones")
def test_where_no_episode_ends_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On as many data as by default."""
    arguments = [*TINY, "--env", "halfcheetah-medium", "--dataset-size", "default", "--steps", "2"]
    assert main([*arguments, "--eval-episodes", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert re.search("data .*fdkernels/halfcheetah/medium-100ep-v0.* 100,000 transitions", printed)
    (row, *_) = read(tmp_path / "run" / "evaluations.csv")
    assert float(row["score_mean"]) == pytest.approx(
        100 * (float(row["return_mean"]) + 280.178953) / (12135.0 + 280.178953), rel=1e-6
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.json"}


def test_a_run_is_not_lost_or_mixed(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = finished
    before = (out / "policy.safetensors").read_bytes()
    assert main([*TINY, "--out", str(out), "--resume", "--overwrite"]) == 2
    assert "--resume goes on with a run and --overwrite deletes it" in capsys.readouterr().err
    assert main([*TINY, "--out", str(out)]) == 2
    assert "already holds a run: --resume continues it" in capsys.readouterr().err
    assert main([*TINY, "--out", str(out), "--resume", "--lr", "0.5"]) == 2
    lr = preset_config("quick", "fidec", "hopper-medium").hyper.lr
    assert f"was started with --lr {lr}" in capsys.readouterr().err
    assert main([*TINY, "--out", str(out.parent), "--overwrite"]) == 2
    assert "no run made it" in capsys.readouterr().err
    stranger = out.parent / "stranger"
    stranger.mkdir()
    (stranger / "config.json").write_text("{}")
    assert main([*TINY, "--out", str(stranger), "--overwrite"]) == 2
    assert "no run made it" in capsys.readouterr().err
    assert main([*TINY, "--out", str(out / "config.json")]) == 2
    assert "no run made it" in capsys.readouterr().err
    assert (out / "policy.safetensors").read_bytes() == before


def test_divergence_ends_the_run_and_is_not_checkpointed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--out", str(tmp_path / "run"), "--warmup-lr", "1e30"]) == 3
    message = (
        "error: seed 0 diverged at update 2 (flow warm-up): not finite are losses: flow_loss, total_loss; gradients"
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "policy.safetensors").exists()


@pytest.mark.parametrize("agent", ["deflow", "fql"])
def test_the_other_agents_run(tmp_path: Path, agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--agent", agent, "--steps", "5", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--no-standardize-observations"]) == 0
    assert f"{agent}, mean-flow-of-16" in capsys.readouterr().out.split("score, best")[1]
    assert (tmp_path / "run" / "curve.png").exists()


@pytest.mark.long("three runs")
def test_a_trace_that_one_can_open(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*TINY, "--profile", "--out", str(out)]) == 0
    assert f"profile    {out / 'trace.json'}: 5 updates" in capsys.readouterr().out
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 5
    assert any(event.get("name") == "aten::addmm" for event in events)
    ours, theirs = load_file(out / "policy.safetensors"), load_file(finished[0] / "policy.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # a run that ends in the middle of the trace, and one that ends before it
    assert main([*TINY, "--profile", "--steps", "12", "--out", str(tmp_path / "short")]) == 0
    assert f"profile    {tmp_path / 'short' / 'trace.json'}: 2 updates" in capsys.readouterr().out
    assert main([*TINY, "--profile", "--steps", "7", "--out", str(tmp_path / "shorter")]) == 0
    assert "profile    none: it begins after 10 updates of the agent, and this run made 7" in capsys.readouterr().out


GROUP = [*TINY, "--num-seeds", "2"]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two seeds side by side, and the run's output."""
    out = tmp_path_factory.mktemp("group")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*GROUP, "--out", str(out)]) == 0
    return out, printed.getvalue()


def figures(folder: Path) -> list[float]:
    """The table of metrics without the columns that depend on the clock."""
    rows = read(folder / "metrics.csv")
    return [float(v) for row in rows for name, v in row.items() if v and name not in ("stage", "updates_per_second")]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    weights, expected = load_file(ours / "policy.safetensors"), load_file(theirs / "policy.safetensors")
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_seeds_together_leave_what_each_leaves_alone(
    finished: tuple[Path, str], group: tuple[Path, str], tmp_path: Path
) -> None:
    alone, (out, printed) = finished[0], group
    assert printed.startswith("run        fidec on hopper-medium (Hopper-v5), seed 0 to 1, cpu")
    assert sorted(p.name for p in out.iterdir()) == ["fidec-seed0", "fidec-seed1", "fidec-seeds0to1.png"]
    for seed in (0, 1):
        folder = out / f"fidec-seed{seed}"
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in alone.iterdir())
        assert json.loads((folder / "config.json").read_text())["seed"] == seed
        rows = [(row["step"], row["role"]) for row in read(folder / "evaluations.csv")]
        assert rows == [(step, role) for step in ("6", "16", "26", "30") for role in ROLES]
    np.testing.assert_allclose(figures(out / "fidec-seed0"), figures(alone), rtol=1e-3, atol=1e-4)
    assert_same_weights(out / "fidec-seed0", alone)
    assert main([*TINY, "--seed", "1", "--out", str(tmp_path / "one")]) == 0
    assert_same_weights(out / "fidec-seed1", tmp_path / "one")
    with pytest.raises(AssertionError):
        assert_same_weights(out / "fidec-seed1", alone)


def test_the_table_of_a_group(group: tuple[Path, str]) -> None:
    out, printed = group
    last = [float(read(out / f"fidec-seed{seed}" / "evaluations.csv")[-3]["score_mean"]) for seed in (0, 1)]
    table = printed[printed.index("D4RL-normalised score (Hopper-v5)") :]
    # the interquartile mean of two scores keeps both
    for text in ("seed 0", "seed 1", "interquartile mean", f"{sum(last) / 2:.1f} [", "fidec-seeds0to1.png"):
        assert text in table
    assert (out / "fidec-seeds0to1.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_a_group(tmp_path: Path) -> None:
    config = parse(["--env", "halfcheetah-medium", "--preset", "quick", "--num-seeds", "4", "--out", str(tmp_path)])
    warmup = config.flow_warmup + config.critic_warmup
    gains = {"policy": 30.0, "sample": 15.0, "flow": 0.0}
    evaluations = [
        [
            {"step": warmup + step, "role": role, "score_mean": 40 + gain * step / 1000 + seed}
            for step in (0, 500, 1000)
            for role, gain in gains.items()
        ]
        for seed in range(4)
    ]
    picture = plt.imread(curve.draw_group_curve(config, evaluations, 65.0, "score"))
    for colour in (curve.BLUE, curve.GREEN, curve.ORANGE):
        drawn = np.abs(picture[..., :3] - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
        columns = np.flatnonzero(drawn.any(0))
        assert np.ptp(columns) > 0.8 * picture.shape[1], f"no line from left to right in {colour}"


def test_the_interval_is_that_of_the_interquartile_mean() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0]
    middle, (low, high) = statistics.interquartile_mean(scores)
    assert middle == 4.5
    assert 2 < low < 3.5
    assert 5.5 < high < 400
    assert statistics.interquartile_mean([3.0, 3.0]) == (3.0, (3.0, 3.0))


@pytest.mark.long("two runs of a group, and one that goes on alone is among the others")
def test_a_group_goes_on_where_all_its_seeds_were(
    group: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "group"
    assert main([*GROUP, "--steps", "10", "--out", str(out)]) == 0
    newest = out / "fidec-seed1" / "checkpoints" / "step-000000020.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])  # seed 0 has step 20, seed 1 only the step before
    assert main([*GROUP, "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"refused    checkpoint {newest}" in printed
    assert printed.count("step-000000015.safetensors, step 15") == 2
    for seed in (0, 1):
        ours, theirs = (load_file(f / f"fidec-seed{seed}" / "policy.safetensors") for f in (out, group[0]))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_seed_of_a_group_goes_on_alone(group: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "seed"
    shutil.copytree(group[0] / "fidec-seed1", out)
    assert main([*TINY, "--seed", "1", "--steps", "25", "--out", str(out), "--resume"]) == 0
    assert [row["step"] for row in read(out / "evaluations.csv")][-2:] == ["35", "35"]


def test_a_group_is_not_mixed_or_lost(
    group: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "group"
    shutil.copytree(group[0], out)
    assert main([*GROUP, "--out", str(out)]) == 2
    assert "fidec-seed0 already holds a run: --resume continues it" in capsys.readouterr().err
    assert main([*GROUP, "--num-seeds", "3", "--out", str(out), "--resume"]) == 2
    assert "the seeds have no intact checkpoint of the same step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "halfcheeta-medum-expert"], "Nearest: halfcheetah-medium-expert"),
        (["--env", "halfcheetah-medium", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--env", "halfcheetah-medium", "--device", "meta"], "--device must be auto, cpu or cuda"),
        (["--env", "halfcheetah-medium", "--device", "cpu", "--capture", "on"], "CUDA graphs need a CUDA device"),
    ],
)
def test_errors_are_for_people(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_data_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = functools.partial(load_dataset, download=False, policies=tmp_path)
    monkeypatch.setattr("train.run.load_dataset", without)
    assert main(["--env", "walker2d-simple", "--out", str(tmp_path / "run")]) == 2
    assert "no data for walker2d-simple" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--fisher-t", "1.0"], "--fisher-t must be at least 0 and below 1, got 1.0"),
        (["--num-fisher-samples", "0"], "--num-fisher-samples must be positive"),
        (["--tau", "1.5"], "--tau must be between 0 and 1"),
        (["--num-seeds", "0"], "--num-seeds must be positive, got 0"),
        (["--agent", "fql", "--num-seeds", "-1"], "--num-seeds must be positive, got -1"),
        (["--num-seeds", "two"], "num-seeds"),
        (["--capture", "yes"], "capture"),
        (["--flow-precision", "fp8"], "flow-precision"),
        (["--seed", "-2"], "--seed must be zero or more"),
        (["--seed", "9223372036854"], "--seed must be zero or more, and at most 9223372036853, got 9223372036854"),
        (
            ["--seed", "9223372036853", "--num-seeds", "2"],
            "--num-seeds must be small enough for seeds of at most 9223372036853",
        ),
        (["--acting-samples", "0"], "--acting-samples: Acting: num_samples must be an integer of at least 1, got 0"),
        (["--acting-temperature", "0"], "--acting-temperature: Acting: temperature must be finite and > 0, got 0"),
        (["--alpha", "inf"], "--alpha must be finite"),
        (["--actor-hidden", "16", "0"], "--actor-hidden must be positive widths"),
        (["--preset", "fast"], "preset"),
        (["--agent", "sac"], "agent"),
    ],
)
def test_bad_settings_are_refused_at_once(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--env", "halfcheetah-medium", "--out", str(tmp_path / "run"), *flags])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())


def test_flags_beat_the_preset() -> None:
    def steps(*flags: str) -> int:
        return parse(["--env", "halfcheetah-medium", *flags]).steps

    quick, full = (preset_config(name, "fidec", "halfcheetah-medium").steps for name in ("quick", "full"))
    assert steps("--preset", "full") == full == 1_000_000
    assert steps("--preset", "quick") == steps("--device", "cpu") == quick
    assert steps("--device", "cuda") == full
    assert steps("--preset", "full", "--steps", "7") == 7


@pytest.mark.parametrize("preset", ["quick", "standard"])
@pytest.mark.parametrize("agent", AGENTS)
def test_presets_evaluate_where_the_agent_begins(preset: str, agent: str) -> None:
    for env in ENVIRONMENTS:
        config = preset_config(preset, agent, env)
        assert config.critic_warmup % config.eval_every == 0, env
        assert config.steps % config.eval_every == 0, env


@dataclasses.dataclass(frozen=True)
class OwnConfig(AgentConfig):
    boldness: float = 1.0
    """A hyper-parameter that only this agent has."""


def test_an_agent_may_have_flags_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AGENTS["fql"], "hyperparameters", OwnConfig)
    config = parse(["--env", "halfcheetah-medium", "--agent", "fql", "--preset", "quick", "--boldness", "0.5"])
    assert (config.agent, config.hyper.boldness, config.hyper.grad_clip) == ("fql", 0.5, None)
    assert config.as_json()["hyper"]["boldness"] == 0.5
    with pytest.raises(SystemExit):
        parse(["--env", "halfcheetah-medium", "--agent", "fidec", "--boldness", "0.5"])
    assert "Unrecognized options: --boldness" in capsys.readouterr().err


def test_an_environment_may_change_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    def changes(preset: str, agent: str, online: bool) -> dict[str, object]:
        return {"eval_every": 123, "alpha": 7.0} if (preset, agent) == ("standard", "fql") else {}

    spec = dataclasses.replace(ENVIRONMENTS["halfcheetah-medium"], preset_changes=changes)
    monkeypatch.setitem(ENVIRONMENTS, spec.name, spec)
    asked = ["--env", spec.name, "--preset", "standard", "--device", "cpu"]
    config = parse([*asked, "--agent", "fql"])
    assert (config.steps, config.eval_every, config.hyper.alpha) == (30_000, 123, 7.0)
    assert parse([*asked, "--agent", "fql", "--alpha", "3"]).hyper.alpha == 3, "flags win"
    assert parse(asked).eval_every == preset_config("standard", "fidec", "hopper-medium").eval_every


def test_returns_are_those_of_whole_episodes() -> None:
    def still(obs: np.ndarray) -> np.ndarray:
        return np.zeros((len(obs), 3))

    # Hopper falls over, and what happens after that must not count
    returns, successes = run_episodes("Hopper-v5", still, episodes=3, seed=5)
    alone = [run_episodes("Hopper-v5", still, episodes=1, seed=5 + i).returns[0] for i in range(3)]
    np.testing.assert_allclose(returns, alone)
    assert len(set(returns)) == 3
    assert not successes.any(), "Hopper reports no success"
    again = run_episodes("Hopper-v5", still, episodes=3, seed=5)
    np.testing.assert_array_equal(again.returns, returns, "the kept environments remember something")


def test_equal_rewards_cannot_be_scaled(tmp_path: Path) -> None:
    data = random_dataset(50, 11, 3)
    config = dataclasses.replace(preset_config("quick", "fidec", "hopper-medium"), env="hopper-medium", out=tmp_path)
    with pytest.raises(RunError, match=r"--scale-rewards divides by .* all rewards are equal"):
        Run(config, resolve("hopper-medium"), dataclasses.replace(data, rewards=data.rewards * 0), torch.device("cpu"))
