"""Errors in reading a file that say nothing about it, for which nothing may be deleted or made again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PASSING: dict[str, Exception] = {
    "the disk fails": OSError(errno.EIO, os.strerror(errno.EIO)),
    "the disk fails HDF5": KeyError(
        "Unable to synchronously open object (file read failed: time = Mon Nov 30 07:40:41 2026\n, filename = 'x', "
        "file descriptor = 3, errno = 5, error message = 'Input/output error')"  # as h5py has it
    ),
    "too many files": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "no memory": MemoryError("Unable to allocate 512. MiB"),
}
"""Errors in reading a file that say nothing about it."""
SAID = {
    "the disk fails": "the disk failed to read",
    "the disk fails HDF5": "the disk failed to read",
    "too many files": "ulimit -n",
    "no memory": "enough memory for it (Unable to allocate 512. MiB); free some",
    "no room": "bytes of memory, and 9 are left; free some",
}
"""What a command says of them, and where there is less memory than an array takes."""


def fail(error: Exception) -> Callable[..., Any]:
    """A stand-in for any function, which raises that error."""

    def failing(*args: Any, **options: Any) -> Any:
        raise error

    return failing


def files_in(folder: Path) -> dict[Path, bytes]:
    """The files in a folder and in those in it, but for locks."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"}
