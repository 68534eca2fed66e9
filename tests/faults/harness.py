"""Runs of the real command that are killed, and what they must have in common with one that never was."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.faults.launcher import Fault, launch
from tests.waiting import PATIENCE, descendants
from train.outputs.checkpoint import newest_checkpoints
from train.outputs.events import read_events
from train.outputs.folder import LOCK

LAUNCHER = Path(__file__).with_name("launcher.py")
RUN = Path(__file__).parents[2] / "train" / "run.py"
TINY = (  # noqa: SIM905 (reads as typed)
    "--env hopper-medium --dataset-size 2 --actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 --batch-size 32 "
    "--flow-warmup 6 --critic-warmup 4 --steps 20 --log-every 5 --eval-every 10 --eval-episodes 2 --checkpoint-every 5 "
    "--preset quick --device cpu --no-anneal --freeze-flow-after None --freeze-critic-after None"
).split()


IMPORTED_LATER = ("torch._dynamo", "train.outputs.curve", "scipy.stats")
"""Modules that the first optimiser and the first pictures of a run import, which takes seconds."""


class Life:
    """A process of a run, from its start to its end, with all the processes that it starts."""

    def __init__(self, process: subprocess.Popen[bytes] | ForkServerProcess, log: Path) -> None:
        self.process, self.log = process, log

    def kill(self) -> None:
        """Kill all of its processes; those of torchrun are in sessions of their own."""
        assert self.process.pid is not None
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    @property
    def status(self) -> int | None:
        """Its exit status, which is negative if a signal ended it; None if it still runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self) -> int:
        """Wait for its end, and return its exit status."""
        assert not self.wait_until(lambda: False)
        assert self.status is not None
        return self.status

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Wait until the condition holds, or the process ends; whether it still runs."""
        deadline = time.monotonic() + PATIENCE
        while self.status is None and not condition():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"nothing happened:\n{self.printed}")
            time.sleep(0.01)
        return self.status is None

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")


@dataclasses.dataclass(frozen=True)
class Command:
    """A way to start the same run again and again.

    Args:
        out: the run's folder, or the parent of those of several seeds.
        arguments: those of ``train/run.py``, without --out and --resume.
        prefix: what starts a Python script, such as torchrun. None: each life is forked from a process that has made
            the imports, which are most of a short life.
    """

    out: Path
    arguments: Sequence[str] = tuple(TINY)
    prefix: Sequence[str] | None = None

    def start(self, *more: str, fault: Fault | None = None) -> Life:
        """Start a life of the run: it begins, or goes on from its newest checkpoint."""
        log = self.out.with_name(self.out.name + ".log")
        log.write_bytes(b"")
        argv = [str(RUN), *self.arguments, "--out", str(self.out), "--resume", *more]
        if self.prefix is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["train.run", *IMPORTED_LATER])
            process = context.Process(target=_live, args=(log, dict(os.environ), fault, argv))
            process.start()
            return Life(process, log)
        launcher = [] if fault is None else [str(LAUNCHER), json.dumps(fault)]
        with log.open("wb") as file:
            argv = [*self.prefix, *launcher, *argv]
            return Life(subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent), log)

    def finish(self) -> None:
        life = self.start()
        assert life.wait() == 0, life.printed

    def die_of(self, fault: Fault) -> None:
        """A life that ends by this fault. torchrun itself then ends with 1 and says which process was killed."""
        life = self.start(fault=fault)
        status = life.wait()
        killed = status == -signal.SIGKILL or (status == 1 and "Signal 9 (SIGKILL)" in life.printed)
        assert killed, f"{fault} did not happen, exit status {status}:\n{life.printed}"


def _live(log: Path, environment: dict[str, str], fault: Fault | None, argv: Sequence[str]) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(log.parent)
    os.environ.update(environment)
    launch(fault, argv)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Both folders hold the same run, bit for bit, apart from what depends on the clock."""
    assert files(ours) == files(theirs), sorted(set(files(ours)) ^ set(files(theirs)))
    for name in ("evaluations.csv", "curve.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{ours / name} differs from {theirs}"
    for name in ("policy.safetensors", *best(theirs)):
        assert_same_policy(ours / name, theirs / name)
    assert rows(ours / "metrics.csv") == rows(theirs / "metrics.csv")
    assert scalars(ours) == scalars(theirs)
    assert_on_record(ours)
    assert summary(ours) == summary(theirs)
    for kept, expected in zip(checkpoints(ours), checkpoints(theirs), strict=True):
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


def assert_same_policy(ours: Path, theirs: Path) -> None:
    """The order of the entries in a header is random."""
    with safe_open(ours, framework="pt") as our, safe_open(theirs, framework="pt") as their:
        assert our.metadata() == their.metadata()
        assert sorted(our.keys()) == sorted(their.keys())
        assert all(torch.equal(our.get_tensor(name), their.get_tensor(name)) for name in their.keys())  # noqa: SIM118


def assert_same_group(ours: Path, theirs: Path) -> None:
    """`assert_same_run` for the folders of several seeds, and their common picture."""
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        if (theirs / name).is_dir():
            assert_same_run(ours / name, theirs / name)
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def files(folder: Path) -> list[str]:
    """All files of a run but its lock; the name of its one file of events depends on the clock."""
    everything = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    found = sorted(str(path.relative_to(folder)) for path in everything)
    return ["tensorboard/events" if name.startswith("tensorboard/events.out.tfevents.") else name for name in found]


def best(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.startswith("checkpoints/best-")]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "updates_per_second"} for row in csv.DictReader(file)
        ]


def scalars(folder: Path) -> list[tuple[str, int, float | None]]:
    """The scalars of TensorBoard in their order, without the values that depend on the clock."""
    return [
        (value.tag, event.step, None if value.tag == "train/updates_per_second" else value.simple_value)
        for path in sorted((folder / "tensorboard").iterdir())
        for event in read_events(path)
        for value in event.summary.value
    ]


def assert_on_record(folder: Path) -> None:
    """TensorBoard has each number of the tables once, and no other."""
    metrics = [
        (f"train/{name}", int(row["step"]))
        for row in rows(folder / "metrics.csv")
        for name, value in row.items()
        if value and name not in ("step", "stage")
    ]
    metrics += [("train/updates_per_second", int(row["step"])) for row in rows(folder / "metrics.csv")]
    evaluations = [
        (f"evaluation/{row['role']}_{name}", int(row["step"]))
        for row in rows(folder / "evaluations.csv")
        for name in ("return_mean", "score_mean")
    ]
    assert sorted((tag, step) for tag, step, _ in scalars(folder)) == sorted([*metrics, *evaluations])


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result.json").read_text())
    for name in ("out", "resume", "overwrite"):
        del found["config"][name]
    del found["seconds"]
    return found


def checkpoints(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the newest checkpoint, which must be intact, and of the others."""
    newest, problems = newest_checkpoints([folder / "checkpoints"])
    assert newest, "no checkpoint is intact"
    assert not problems
    for path in sorted((folder / "checkpoints").glob("step-*.safetensors")):
        yield load_file(path)
