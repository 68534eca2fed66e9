"""Runs in several processes: the parameters of one process, one writer, and an end together."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes.updates import CASES, states
from tests.test_run import LONGER, REPOSITORY, TINY, read
from tests.waiting import PATIENCE, descendants, wait_for_checkpoint
from train import processes
from train.outputs.diverged import read_diverged
from train.run import choose_device, main
from train.settings import RunError

pytestmark = pytest.mark.usefixtures("datasets")


def torchrun(count: int, *options: str) -> list[str]:
    options = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *options]


def training(*arguments: str) -> list[str]:
    return [str(REPOSITORY / "train" / "run.py"), *TINY, *arguments]


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """A test that fails must not leave processes behind that wait for each other."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    STARTED.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
    return STARTED[-1]


def finished(command: Sequence[str]) -> str:
    """What it printed."""
    process = started(command)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return printed


# -- updates -----------------------------------------------------------------------------------------------------------


@functools.cache
def states_in_one_process() -> dict[str, Any]:
    return states()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long("four starts"))])
def states_in_several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("updates") / "states.pt"
    finished([*torchrun(request.param), str(REPOSITORY / "tests" / "processes" / "updates.py"), str(file)])
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_one_process(states_in_several: dict[str, Any], case: str) -> None:
    """In float64, with a batch of 32 that three processes cannot share equally."""
    torch.testing.assert_close(states_in_several[case], states_in_one_process()[case], rtol=1e-9, atol=1e-12)


def test_rows_of_all_processes_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch_size, total in ((256, 4), (10, 3), (3, 3)):
        taken: list[int] = []
        for rank in range(total):
            monkeypatch.setattr(processes, "_place", processes.Place(rank, total))
            taken += range(batch_size)[processes.own_rows(batch_size)]
        assert taken == list(range(batch_size))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("together") / "run"
    return out, finished([*torchrun(2), *training("--out", str(out))])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy.safetensors")


def test_one_run_with_one_writer(together: tuple[Path, str], alone: Path) -> None:
    out, printed = together
    assert json.loads((out / "result.json").read_text())["processes"] == 2
    assert json.loads((alone / "result.json").read_text())["processes"] == 1
    assert printed.count("run        fidec on hopper-medium") == 1
    assert "processes  2, each with 16 of the batch's 32 rows" in printed
    assert printed.count("D4RL-normalised score") == 1
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())
    steps = [[row["step"] for row in read(run / "metrics.csv")] for run in (out, alone)]
    assert steps[0] == steps[1]
    assert len(list((out / "tensorboard").iterdir())) == len(list((alone / "tensorboard").iterdir()))


def test_a_run_is_that_of_one_process_but_for_rounding(together: tuple[Path, str], alone: Path) -> None:
    # In 30 updates Adam moves a weight by up to 0.02. Rounding moves gradients, and Adam most where they are near zero.
    ours, theirs = weights(together[0]), weights(alone)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    columns = ("flow_loss", "critic_loss", "q_data", "action_error", "penalty")
    for mine, other in zip(read(together[0] / "metrics.csv"), read(alone / "metrics.csv")):
        for name in columns:
            if other[name]:
                assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-2, abs=1e-4), name


def processes_of(agent: int) -> list[int]:
    """Those that a torchrun started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if b"run.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes by Linux's /proc")
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long("two runs"))])
def test_a_killed_process_ends_all_and_the_run_goes_on(together: tuple[Path, str], tmp_path: Path, victim: int) -> None:
    out = tmp_path / "run"
    process = started([*torchrun(2), *training("--out", str(out), *LONGER)])
    wait_for_checkpoint(out, process)
    ranks = processes_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert f"error (process {1 - victim}): process {1 - victim} has lost contact with the others" in errors
    assert "--resume goes on from the last checkpoint" in errors
    assert "train/loop.py" not in errors, "a traceback of ours, not torchrun's"
    step = max(int(file.stem.removeprefix("step-")) for file in out.glob("checkpoints/step-*.safetensors"))
    printed = finished([*torchrun(1 if victim else 3), *training("--out", str(out), *LONGER, "--resume")])
    assert f"step-{step:09}.safetensors, step {step}" in printed
    assert json.loads((out / "result.json").read_text())["processes"] == (1 if victim else 3)
    assert [int(row["step"]) for row in read(out / "metrics.csv")][-1] == 410


@pytest.mark.long("two runs")
def test_it_goes_on_bit_for_bit_with_as_many(together: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished([*torchrun(2), *training("--out", str(out), "--steps", "10")])
    finished([*torchrun(2), *training("--out", str(out), "--resume")])
    ours, theirs = weights(out), weights(together[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    mine, other = (read(run / "evaluations.csv") for run in (out, together[0]))
    assert [row for row in mine if row["step"] != "20"] == other, "the shorter run was also evaluated at its end"


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long("ends the same way"))]
)
def test_a_signal_stops_all_after_the_same_update(tmp_path: Path, how: int) -> None:
    out = tmp_path / "run"
    process = started([*torchrun(2), *training("--out", str(out), *LONGER)])
    wait_for_checkpoint(out, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    (step,) = re.findall(r"stopped at step (\d+); --resume continues from there", errors)
    assert (out / "checkpoints" / f"step-{int(step):09}.safetensors").exists()
    assert "error (process" not in errors


@pytest.mark.long("two runs in two processes")
def test_several_seeds_in_several_processes(tmp_path: Path) -> None:
    assert main([*TINY, "--num-seeds", "2", "--out", str(tmp_path / "alone")]) == 0
    finished([*torchrun(2), *training("--num-seeds", "2", "--out", str(tmp_path / "together"))])
    for seed in (0, 1):
        ours, theirs = (weights(tmp_path / name / f"fidec-seed{seed}") for name in ("together", "alone"))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)
    assert (tmp_path / "together" / "fidec-seeds0to1.png").exists()


@pytest.mark.long("three runs of two processes")
def test_a_seed_that_diverges_leaves_the_other(tmp_path: Path) -> None:
    """NaN in a row of the second seed that only the second process has."""
    out = tmp_path / "run"
    script = [str(REPOSITORY / "tests" / "processes" / "one_seed_diverges.py"), *TINY, "--num-seeds", "2"]
    process = started([*torchrun(2), *script, "--out", str(out)])
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "error (process 0): seed 1 diverged at update 12 (fidec)" in errors, errors
    assert "the other seeds go on" in printed
    saved = read_diverged(out / "fidec-seed1")
    assert saved.update is not None
    assert torch.nonzero(saved.update.batch.rewards.isnan()).flatten().tolist() == [31], "the whole batch is saved"
    assert not (out / "fidec-seed1" / "policy.safetensors").exists()

    finished([*torchrun(2), *training("--num-seeds", "2", "--out", str(tmp_path / "undisturbed"))])
    ours, theirs = (weights(folder / "fidec-seed0") for folder in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    alone = ["--num-seeds", "1", "--seed", "1", "--out", str(out / "fidec-seed1"), "--resume"]
    assert "diverged   before: seed 1 diverged at update 12" in finished([*torchrun(2), *training(*alone)])
    assert not (out / "fidec-seed1" / "diverged.safetensors").exists()


@pytest.mark.long("three runs")
def test_online_all_processes_see_the_same(tmp_path: Path) -> None:
    online = ["--online-steps", "20"]
    finished([*torchrun(2), *training(*online, "--out", str(tmp_path / "straight"))])
    finished([*torchrun(2), *training(*online, "--online-steps", "9", "--out", str(tmp_path / "resumed"))])
    finished([*torchrun(2), *training(*online, "--out", str(tmp_path / "resumed"), "--resume")])
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def node(meeting: Path, rank: int) -> list[str]:
    """One of two nodes. They meet by a file, because a port that is free now may be taken when it is used."""
    return torchrun(
        1,
        *("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", str(meeting), "--rdzv-id", "test"),
        *("--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1", "--node-rank", str(rank)),
    )


@pytest.mark.long("a run on two nodes")
def test_two_nodes(together: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    nodes = [started([*node(tmp_path / "meeting", rank), *training("--out", str(out))]) for rank in (0, 1)]
    outputs = [process.communicate(timeout=PATIENCE) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    ours, theirs = weights(out), weights(together[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long("a run on two nodes")
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes by Linux's /proc")
def test_a_lost_node_ends_the_other(tmp_path: Path) -> None:
    out = tmp_path / "run"
    nodes = [started([*node(tmp_path / "meeting", rank), *training("--out", str(out), *LONGER)]) for rank in (0, 1)]
    wait_for_checkpoint(out, nodes[0])
    for pid in [*processes_of(nodes[1].pid), nodes[1].pid]:
        os.kill(pid, signal.SIGKILL)
    _, errors = nodes[0].communicate(timeout=PATIENCE)
    assert nodes[0].returncode != 0
    assert "has lost contact with the others" in errors
    nodes[1].communicate()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.long("two starts")
@pytest.mark.parametrize("more", [["--lr", "2e-3"], ["--resume"]])
def test_processes_that_differ_are_refused(tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "run"
    nodes = [
        started([*node(tmp_path / "meeting", rank), *training("--out", str(out), *more[: rank * 2])]) for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in nodes]
    assert all(process.returncode != 0 for process in nodes)
    assert any("the processes of this run have different settings" in text for text in errors), errors


@pytest.mark.long("three starts")
def test_more_processes_than_rows(tmp_path: Path) -> None:
    process = started([*torchrun(3), *training("--out", str(tmp_path / "run"), "--batch-size", "2")])
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode != 0
    assert "error (process 0): --batch-size 2 leaves nothing for some of 3 processes" in errors
    assert not (tmp_path / "run").exists()


def test_each_process_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", processes.Place(5, 8, 1)) == torch.device("cuda", 1)
    assert choose_device("cpu", processes.Place(5, 8, 1)) == torch.device("cpu")
    with pytest.raises(RunError, match="more processes than there are GPUs on this machine, 2"):
        choose_device("cuda", processes.Place(2, 8, 2))
    with pytest.raises(RunError, match="--device must be auto, cpu or cuda with several processes, got cuda:1"):
        choose_device("cuda:1", processes.Place(0, 2, 0))
