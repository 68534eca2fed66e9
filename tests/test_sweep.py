"""Sweeps on Ray: the table says what the runs say, whatever dies on the way, and nothing begins with bad input."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.waiting import PATIENCE, wait_for
from train import run
from train.environments import ENVIRONMENTS
from train.outputs import statistics
from train.outputs.checkpoint import newest_step
from train.outputs.folder import lock_folders
from train.outputs.scores import Scores, Trial, is_finished
from train.outputs.scores_picture import COLOURS, draw_scores

ray = pytest.importorskip("ray", reason="pip install -e '.[sweep]'")

from ray.cluster_utils import Cluster  # noqa: E402

from train import sweep  # noqa: E402
from train.worker import Board, Site, problem_of_node, version  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
ENV = "hopper-medium"  # whose episodes are short, if nobody has learned to walk
TWO = ["--envs", ENV, "--agents", "fidec", "--seeds", "0", "1", "--preset", "quick"]
ASKED = [*TWO, "--agents", "fidec", "fql"]
SHORT = (  # noqa: SIM905 (reads as typed)
    "--actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 --batch-size 32 --flow-warmup 6 --critic-warmup 4 "
    "--steps 300 --log-every 5 --eval-every 150 --eval-episodes 2 --checkpoint-every 10 --dataset-size 2 "
    "--no-anneal --freeze-flow-after None --freeze-critic-after None"
).split()


def trial(env: str, agent: str, seed: int, status: Any, scores: tuple[float, float, float] | None) -> Trial:
    options = ["--env", env, "--agent", agent, "--seed", str(seed), "--preset", "quick"]
    rows = {}
    for role, score in zip(("policy", "sample", "flow"), scores or ()):
        columns = ("step", "role", "return_mean", "return_sem", "score_mean", "score_sem", "episodes")
        rows[role] = dict(zip(columns, ("9", role, "1", "0", str(score), "0.5", "20")))
    return Trial(run.parse(options), options, status, step=9 if rows else 0, evaluations=rows)


def test_the_table_marks_what_is_not_final() -> None:
    cheetah, hopper = "halfcheetah-medium", "hopper-medium"
    trials = [
        trial(cheetah, "fidec", 0, "finished", (80, 70, 40)),
        trial(cheetah, "fidec", 1, "finished", (90, 70, 44)),
        trial(cheetah, "fql", 0, "running", (60, 50, 41)),
        trial(cheetah, "fql", 1, "waiting", None),
        trial(hopper, "fidec", 0, "finished", (30, 20, 10)),
        trial(hopper, "fidec", 1, "failed", (900, 900, 900)),
        trial(hopper, "fql", 0, "waiting", None),
        trial(hopper, "fql", 1, "waiting", None),
    ]
    trials[5].error = "training diverged"
    lines = Scores(trials).markdown().splitlines()
    assert lines[0] == (
        "| | FiDec, mean-flow-of-16 | FiDec, one sample | FQL, mean-flow-of-16 | FQL, one sample | "
        "behaviour cloning (FiDec's flow alone) |"
    )
    assert lines[2] == (
        "| halfcheetah-medium | 85.0 (80.0 to 90.0) | 70.0 (70.0 to 70.0) | *60.0 (60.0 to 60.0)*, 0 of 2 | "
        "*50.0 (50.0 to 50.0)*, 0 of 2 | 42.0 (40.0 to 44.0) |"
    )
    assert lines[3] == (
        "| hopper-medium | *30.0 (30.0 to 30.0)*, 1 of 2 | *20.0 (20.0 to 20.0)*, 1 of 2 | –, 0 of 2 | –, 0 of 2 | "
        "*10.0 (10.0 to 10.0)*, 1 of 2 |"
    )
    # (85 + 30) / 2; only the first varies
    assert lines[4].startswith("| mean | *57.5 (55.0 to 60.0)*, 3 of 4 | *45.0 (45.0 to 45.0)*, 3 of 4 |")
    text = "\n".join(lines)
    assert "3 of 8 trials have finished" in text
    assert "| halfcheetah-medium/fql-seed0 | 9 of 38,000 | 60.0 ± 0.5 |" in text
    assert "- hopper-medium/fidec-seed1: training diverged" in text
    rows = list(csv.DictReader(io.StringIO(Scores(trials).csv())))
    assert len(rows) == 3 * len(trials)
    assert rows[0]["score_mean"] == "80"
    assert [rows[15][name] for name in ("env", "agent", "seed", "role", "status", "error")] == [
        *("hopper-medium", "fidec", "1", "policy", "failed", "training diverged")
    ]
    assert rows[-1]["score_mean"] == ""


def test_the_mean_weighs_environments_equally() -> None:
    scores = [[10.0, 20.0, 30.0, 40.0], [90.0]]
    middle, (low, high) = statistics.mean_of_tasks(scores)
    assert middle == (25 + 90) / 2
    of_first = statistics.interquartile_mean(scores[0])[1]
    assert (low, high) == pytest.approx([(bound + 90) / 2 for bound in of_first])
    several = statistics.mean_of_tasks([scores[0]] * 9)[1]
    assert several[1] - several[0] < 0.5 * (of_first[1] - of_first[0]), "seeds are resampled together"


@pytest.mark.parametrize("count", [1, 50])
def test_the_picture_shows_every_cell(count: int) -> None:
    envs = list(ENVIRONMENTS)[:count]
    trials = [
        trial(env, agent, 0, "finished", (100 * i / count, 50, 50))
        for i, env in enumerate(envs)
        for agent in ("fidec", "fql")
    ]
    picture = plt.imread(io.BytesIO(draw_scores(Scores(trials))))[..., :3]
    assert picture.shape[0] < 130 * (2 + 0.5 * (count + 1))
    for colour in COLOURS[0], COLOURS[2]:  # FiDec and FQL
        there = np.abs(picture - mpl.colors.to_rgb(colour)).max(-1) < 0.02
        assert np.ptp(np.flatnonzero(there.any(1))) > (0.8 if count > 1 else 0.1) * picture.shape[0]


def test_a_run_is_finished_if_it_is_the_one_asked_for(tmp_path: Path) -> None:
    config = dataclasses.replace(trial("hopper-medium", "fql", 0, "waiting", None).config, out=tmp_path)
    assert not is_finished(config)
    (tmp_path / "result.json").write_text(json.dumps({"config": config.as_json()}))
    assert is_finished(config)
    assert is_finished(dataclasses.replace(config, device="cpu", resume=True))
    assert not is_finished(dataclasses.replace(config, steps=config.steps + 1))
    assert not is_finished(dataclasses.replace(config, hyper=dataclasses.replace(config.hyper, lr=0.5)))
    (tmp_path / "result.json").write_text(json.dumps({"config": config.as_json()})[:100])
    assert not is_finished(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--envs", "hopper-medum"], "Nearest: hopper-medium"),
        (["--envs", "hopper-medium", "hopper-medium"], "--envs must be one or more, each once"),
        (["--envs", "hopper-medium", "--seeds", "1", "1"], "--seeds must be one or more, each once"),
        (["--envs", "hopper-medium", "--seeds", "-1"], "--seeds must be zero or more"),
        (
            ["--envs", "hopper-medium", "--seeds", "9223372036854"],
            "--seeds must be zero or more, and at most 922337203",
        ),
        (["--envs", "hopper-medium", "--agents"], "--agents must be one or more, each once"),
        (["--envs", "hopper-medium", "--cpus-per-trial", "0"], "--cpus-per-trial must be positive"),
        (["--envs", "hopper-medium", "--gpus-per-trial", "2"], "--gpus-per-trial must be between 0 and 1"),
        (["--envs", "hopper-medium", "--", "--stepps", "4"], "--stepps"),
        (["--envs", "hopper-medium", "--", "--lr", "nan"], "--lr must be finite"),
        (["--envs", "hopper-medium", "--", "--seed", "0"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--env", "walker2d-medium"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--num-seeds", "2"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--out", "elsewhere"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--device", "cuda"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--overwrite"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--no-resume"], "behind -- there can be no"),
        (["--envs", "hopper-medium", "--", "--quiet"], "behind -- there can be no"),
    ],
)
def test_bad_input_is_named_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = sweep.main(["--out", str(tmp_path / "sweep"), *arguments])
    except SystemExit as exit_info:
        code = exit_info.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in " ".join((printed.err + printed.out).replace("│", " ").split())
    assert not (tmp_path / "sweep").exists()


def test_without_ray_the_extra_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; import train.sweep"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: train/sweep.py needs Ray: pip install -e '.[sweep]'"


# -- with Ray ----------------------------------------------------------------------------------------------------------


def processes_with(mark: str) -> list[str]:
    """The command lines of processes that have this in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return [command for command in found if command]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Something in the environment of all processes that a test starts, none of which may survive it."""
    name = f"sweep-{uuid.uuid4().hex}"
    monkeypatch.setenv("STARTED_BY", name)
    yield name
    nothing_runs(name)


def nothing_runs(mark: str) -> None:
    try:
        wait_for(lambda: not processes_with(mark), "")
    except AssertionError:
        left = [command[:80] for command in processes_with(mark)]
        raise AssertionError(f"left running: {left}") from None


def start(out: Path, *arguments: str, asked: list[str] = ASKED) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "train" / "sweep.py"), *asked, "--out", str(out), *arguments]
    return subprocess.Popen([*command, "--", *SHORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int) -> str:
    """What it printed."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, out + err
    return out


def tables(out: Path) -> tuple[str, str]:
    return (out / "sweep.md").read_text(), (out / "sweep.csv").read_text()


def folders(out: Path) -> list[Path]:
    return sorted(out.glob("*/*-seed*"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, datasets: None) -> tuple[Path, str]:
    """An undisturbed sweep of this machine, and what it printed."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    process = start(out)
    printed, said = process.communicate(timeout=900)
    assert process.returncode == 0, printed + said
    assert "ray" not in said.lower(), "the terminal is for the sweep"
    return out, printed


def test_a_sweep_gathers_what_its_runs_say(swept: tuple[Path, str], tmp_path: Path) -> None:
    out, printed = swept
    assert sorted(path.name for path in out.iterdir()) == [".lock", ENV, "sweep.csv", "sweep.md", "sweep.png"]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(out)]
    assert [(r["config"]["agent"], r["config"]["seed"]) for r in results] == [
        *(("fidec", 0), ("fidec", 1), ("fql", 0), ("fql", 1))
    ]
    last = [result["results"]["policy"]["last"]["score_mean"] for result in results]
    markdown, numbers = tables(out)
    assert markdown in printed
    cells = markdown.splitlines()[2].split(" | ")
    assert cells[1].startswith(f"{sum(last[:2]) / 2:.1f} (")
    assert cells[3].startswith(f"{sum(last[2:]) / 2:.1f} (")
    rows = [row for row in csv.DictReader(io.StringIO(numbers)) if row["role"] == "policy"]
    assert sorted(float(row["score_mean"]) for row in rows) == pytest.approx(sorted(last), rel=1e-6)
    assert {row["status"] for row in rows} == {"finished"}
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    log = (folders(out)[0] / "log.txt").read_text()
    assert "fidec on hopper-medium" in log
    assert "updates" not in printed
    options = ["--env", ENV, "--agent", "fql", "--seed", "1", "--preset", "quick", "--device", "cpu", *SHORT]
    command = [sys.executable, str(REPOSITORY / "train" / "run.py"), *options, "--out", str(tmp_path / "run")]
    alone = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert alone.returncode == 0
    assert_same_bits(out / ENV / "fql-seed1", tmp_path / "run")


def assert_same_bits(ours: Path, theirs: Path) -> None:
    weights, expected = (load_file(folder / "policy.safetensors") for folder in (ours, theirs))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected), ours
    assert (ours / "evaluations.csv").read_bytes() == (theirs / "evaluations.csv").read_bytes()


def test_a_second_call_reads_what_has_finished(
    swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = swept
    before = tables(out)
    (out / "sweep.md").unlink()
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert sweep.main([*ASKED, "--out", str(out), "--", *SHORT]) == 0
    assert tables(out) == before
    assert sweep.main([*ASKED, "--out", str(out), "--", *SHORT, "--lr", "0.1"]) == 2
    assert "was started with --lr" in capsys.readouterr().err
    with lock_folders([out]):
        assert sweep.main([*ASKED, "--out", str(out), "--", *SHORT]) == 2
    assert f"another process is training in {out}" in capsys.readouterr().err


@pytest.mark.long("a sweep that goes on")
def test_a_trial_that_fails_is_listed_and_the_others_finish(swept: tuple[Path, str], tmp_path: Path, mark: str) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(swept[0], out)
    failing, going_on, kept = (out / ENV / name for name in ("fql-seed1", "fidec-seed0", "fidec-seed1"))
    options = ["--env", ENV, "--agent", "fql", "--seed", "1", "--preset", "quick", "--device", "cpu", *SHORT]
    # a checkpoint from other data
    assert run.main([*options, "--dataset-size", "1", "--steps", "1", "--out", str(failing), "--overwrite"]) == 0
    config = json.loads((failing / "config.json").read_text())
    (failing / "config.json").write_text(json.dumps({**config, "dataset_size": 2}))
    for path in (going_on / "result.json", max(going_on.glob("checkpoints/*"))):
        path.unlink()
    before = (kept / "log.txt").read_bytes()
    printed = ended(start(out), 1)
    assert f"failed     {ENV}/fql-seed1: --resume: {failing / 'checkpoints'}" in printed
    markdown, numbers = tables(out)
    assert f"- {ENV}/fql-seed1: --resume: " in markdown
    assert "3 of 4 trials have finished" in markdown
    assert f"| {ENV} | {swept_cell(swept[0], 1)} |" in markdown, (
        "the finished trials and the resumed one count as before"
    )
    assert (kept / "log.txt").read_bytes() == before, "trained again"
    assert_same_bits(going_on, swept[0] / ENV / "fidec-seed0")
    assert "was trained on other data" in numbers


def swept_cell(out: Path, column: int) -> str:
    return tables(out)[0].splitlines()[2].strip("| ").split(" | ")[column]


def training(out: Path) -> list[tuple[Path, int]]:
    """The folders of trials with a checkpoint and most of their updates before them, and who last trained there."""
    found = []
    for folder in folders(out):
        if 0 < newest_step(folder / "checkpoints") <= 100:
            begun = re.findall(r"^== on .*, process (\d+)$", (folder / "log.txt").read_text(), re.M)
            found.append((folder, int(begun[-1])))
    return [(folder, pid) for folder, pid in found if Path(f"/proc/{pid}").exists()]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.long("a sweep of four runs with restarts")
def test_what_dies_is_made_up_for_to_the_last_bit(swept: tuple[Path, str], tmp_path: Path, mark: str) -> None:
    out = tmp_path / "sweep"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=1)
    (raylet,) = other.all_processes["raylet"]
    process = start(out, "--address", cluster.address)
    try:

        def on_other(yes: bool) -> list[tuple[Path, int]]:
            found = [(folder, pid, parent_of(pid)) for folder, pid in training(out)]
            return [(folder, pid) for folder, pid, of in found if of and (of == raylet.process.pid) == yes]

        killed, worker = wait_for(lambda: on_other(False), "no trial on the first node has a checkpoint")[0]
        os.kill(worker, signal.SIGKILL)
        lost, _ = wait_for(lambda: on_other(True), "no trial on the second node has a checkpoint")[0]
        cluster.remove_node(other, allow_graceful=False)
        printed = ended(process, 0)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        cluster.shutdown()
    for folder in (killed, lost):
        assert f"again      {folder.relative_to(out)}, from step" in printed
        log = (folder / "log.txt").read_text()
        assert log.count("== on ") >= 2
        assert "resume     " in log
    assert tables(out) == tables(swept[0])
    for ours, theirs in zip(folders(out), folders(swept[0]), strict=True):
        assert_same_bits(ours, theirs)


@pytest.fixture(scope="module")
def two_of_them(swept: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed sweep, had it been asked for FiDec alone."""
    out = tmp_path_factory.mktemp("two") / "sweep"
    shutil.copytree(swept[0], out)
    for folder in out.glob(f"{ENV}/fql-*"):
        shutil.rmtree(folder)
    assert sweep.main([*TWO, "--out", str(out), "--", *SHORT]) == 0
    return out


@pytest.mark.long("two sweeps of two runs")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_stopped_sweep_goes_on(two_of_them: Path, tmp_path: Path, mark: str, how: signal.Signals) -> None:
    out = tmp_path / "sweep"
    process = start(out, asked=TWO)
    wait_for(lambda: training(out), "no trial has a checkpoint")
    process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    nothing_runs(mark)
    if how != signal.SIGKILL:
        assert errors.endswith("stopped; the same command continues\n")
        assert "| unfinished | step | score |" in tables(out)[0]
    ended(start(out, asked=TWO), 0)
    assert tables(out) == tables(two_of_them)
    for ours, theirs in zip(folders(out), folders(two_of_them), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.long("a cluster")
def test_what_a_cluster_lacks_is_said_at_once(tmp_path: Path, mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*ASKED, "--out", str(tmp_path), "--address", "127.0.0.1:1", "--", *SHORT]) == 2
    assert "error: no Ray at 127.0.0.1:1: " in capsys.readouterr().err
    assert sweep.main([*ASKED, "--out", str(tmp_path), "--cpus-per-trial", "999", "--", *SHORT]) == 2
    assert "no node has 999 cores and 0 GPUs for a trial" in capsys.readouterr().err
    assert not folders(tmp_path)


def test_a_node_that_cannot_take_part_says_why(tmp_path: Path) -> None:
    site = Site(tmp_path / "mark", version())
    assert "does not see" in problem_of_node(site)
    site.mark.touch()
    assert problem_of_node(site) == ""
    assert "has another version of this project" in problem_of_node(site._replace(version="another"))
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def test_dying_in_vain_is_counted() -> None:
    board = Board()
    for node, step in (("a", 0), ("a", 0), ("b", 5), ("a", 5), ("c", 5)):
        board.begin("trial", node, step)
    assert board.last_starts() == {"trial": ("c", 5, 5, 2)}
