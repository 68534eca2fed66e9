"""A command with a fault: ``launcher.py FAULT SCRIPT ARGUMENTS`` kills itself at the point that FAULT describes.

FAULT is a `Fault` as JSON. Only what writes files is replaced; the rest is SCRIPT as from the shell.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Point = Literal["row", "half", "written", "renamed", "begun"]


class Fault(NamedTuple):
    """A point of time at which a process dies."""

    at: Point
    """row: half of an appended row is written. half: half of a new file is written. written: a new file is whole, but
    does not have its name yet. renamed: it has just got its name. begun: something was written into the room that was
    reserved for a file."""
    file: str
    """Pattern of the file's whole path, or of the folder's."""
    nth: int = 1
    """How many times such a point is reached."""


def arm(fault: Fault) -> None:
    reached = itertools.count(1)
    write, fsync, fallocate = os.write, os.fsync, os.posix_fallocate

    def is_here(at: Point, path: object) -> bool:
        here = fault.at == at and fnmatch.fnmatch(os.path.abspath(str(path)), fault.file)
        return here and next(reached) == fault.nth

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def fatal_write(descriptor: int, data: Any) -> int:
        if is_here("row", path_of(descriptor)):
            write(descriptor, data[: len(data) // 2])
            die()
        return write(descriptor, data)

    def fatal_fsync(descriptor: int) -> None:
        if is_here("half", path_of(descriptor)):
            os.truncate(path_of(descriptor), os.fstat(descriptor).st_size // 2)
            die()
        if is_here("written", path_of(descriptor)):
            die()
        fsync(descriptor)

    def fatal(rename: Any) -> Any:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            rename(source, target, **options)
            if is_here("renamed", target):
                die()

        return renamed

    def watched_fallocate(descriptor: int, offset: int, size: int) -> None:
        fallocate(descriptor, offset, size)
        if is_here("begun", path_of(descriptor)):  # HDF5 writes without Python
            threading.Thread(target=die_when_written, args=(path_of(descriptor),), daemon=True).start()

    os.write, os.fsync, os.posix_fallocate = fatal_write, fatal_fsync, watched_fallocate
    os.replace, os.rename = fatal(os.replace), fatal(os.rename)


def die_when_written(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        while not any(os.pread(file.fileno(), 20_000, 20_000)):
            time.sleep(0.001)
    die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def launch(fault: Fault | None, argv: Sequence[str]) -> None:
    """Run a script as from the shell, with its arguments."""
    if fault is not None:
        arm(fault)
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    launch(Fault(*json.loads(sys.argv[1])), sys.argv[2:])
