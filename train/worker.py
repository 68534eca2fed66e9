"""What a sweep runs on Ray's nodes: a check of the node, a board, and trials.

Each has a process of its own, and only trials import PyTorch and the training loop, which takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import signal
import socket
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from train.exits import Exit

PATIENCE = 180.0
"""Seconds that a trial waits for its predecessor to leave its folder. NFS gives a dead node's locks back after 90."""
UNFIT = -1
"""`Outcome.code` of a trial that did not begin because its node cannot take part."""


class Outcome(NamedTuple):
    code: int
    """The run's exit code: 0 if it finished."""
    error: str = ""


class Site(NamedTuple):
    """What a node must have to take part."""

    mark: Path
    """A file in the sweep's folder."""
    version: str
    """The `version` of the code."""


def version() -> str:
    """Identifies the code that trains: this project's and PyTorch."""
    found = (importlib.util.find_spec(name) for name in ("fdkernels", "train.run"))
    packages = [Path(spec.origin).parent for spec in found if spec and spec.origin]
    checksum = 0
    for file in sorted(file for package in packages for file in package.rglob("*.py")):
        checksum = zlib.crc32(file.read_bytes(), checksum)
    return f"{checksum:08x}, torch {importlib.metadata.version('torch')}"


def problem_of_node(site: Site) -> str:
    """Why this node cannot take part; empty if it can."""
    host, folder = socket.gethostname(), site.mark.parent
    if not site.mark.exists():
        return f"{host} does not see {folder}; --out must be a folder that all nodes share"
    try:
        own = site.mark.with_name(f"{site.mark.name}-{host}-{os.getpid()}")
        own.touch()
        own.unlink()
    except OSError as error:
        return f"{host} cannot write in {folder}: {error}"
    if (found := version()) != site.version:
        return f"{host} has another version of this project or of PyTorch ({found}, here {site.version})"
    return ""


class Start(NamedTuple):
    """Where a trial last began."""

    node: str
    step: int
    starts: int
    """How often it has begun."""
    in_vain: int
    """How often in a row it began at this step and did not get beyond it, the last time not counted."""

    @staticmethod
    def of(starts: Sequence[tuple[str, int]]) -> Start:
        node, step = starts[-1]
        in_a_row = itertools.takewhile(lambda start: start[1] == step, reversed(starts))
        return Start(node, step, len(starts), sum(1 for _ in in_a_row) - 1)


class Board:
    """Where the trials are, kept by an actor beside the sweep's own process."""

    def __init__(self) -> None:
        self.starts: dict[str, list[tuple[str, int]]] = {}

    def begin(self, trial: str, node: str, step: int) -> None:
        """Note that a trial begins on a node, at a step."""
        self.starts.setdefault(trial, []).append((node, step))

    def last_starts(self) -> dict[str, Start]:
        """Of each trial that has begun."""
        return {trial: Start.of(starts) for trial, starts in self.starts.items()}


def train_trial(name: str, options: Sequence[str], folder: Path, site: Site, threads: int, board: Any) -> Outcome:
    """Train in this process, so that the training dies with it. What is printed goes to the folder's log."""
    if problem := problem_of_node(site):
        return Outcome(UNFIT, problem)
    import torch

    from train.outputs.checkpoint import newest_step
    from train.outputs.folder import LOG

    # not waited for: while a task waits, Ray gives its core to another
    board.begin.remote(name, ray.get_runtime_context().get_node_id(), newest_step(folder / "checkpoints"))
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by which Ray stops a trial, also if a shell ignores it
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", buffering=1) as log:
        for stream in (1, 2):  # messages of C++ code as well; the process ends with its trial
            os.dup2(log.fileno(), stream)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            print(f"== on {socket.gethostname()}, process {os.getpid()}", flush=True)
            start = log.tell()
            return _outcome(options, folder / LOG, start)


def _outcome(options: Sequence[str], file: Path, start: int) -> Outcome:
    from train import run

    try:
        code = run.main(options, patience=PATIENCE)
    except Exception as error:  # not a way for a run to end, but the sweep goes on with the others
        traceback.print_exc()
        return Outcome(Exit.FAILED, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    with file.open(errors="replace") as log:
        log.seek(start)
        errors = [line.removeprefix("error: ").rstrip() for line in log if line.startswith("error: ")]
    return Outcome(code, errors[-1] if errors and code not in (Exit.DONE, Exit.STOPPED) else "")
