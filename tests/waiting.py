"""Processes that tests start: waiting for what they do, and finding those that they started."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 300.0  # seconds that one process may take on a busy machine


def wait_for(condition: Callable[[], T], what: str) -> T:
    """Wait until this returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def wait_for_checkpoint(run: Path, process: subprocess.Popen[Any]) -> None:
    """Wait for the first checkpoint of a run that this process has begun."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return any(run.glob("checkpoints/step-*.safetensors"))

    wait_for(is_there, "no checkpoint was written")


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has just ended
            continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]
