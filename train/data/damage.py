"""Which errors say that a file is damaged. For all others, nothing may be deleted or made again."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

OF_DAMAGE = (None, errno.ENOENT, errno.EINVAL)
"""Numbers of an `OSError` that does say something about the file. NumPy and h5py give none if they do not understand
what it holds; a damaged zip archive may send its reader to a place before its beginning, which is EINVAL."""


def require_damage(error: Exception, path: Path) -> None:
    """Raise what says nothing about the file: that the system could not read it just now, or has no memory for it.

    Raises:
        OSError: names the file.
    """
    if isinstance(error, MemoryError):
        problem = f"there is not enough memory for it ({error}); free some"
        raise OSError(errno.ENOMEM, problem, str(path)) from error
    number = error.errno if isinstance(error, OSError) else _number_of_hdf5(error)
    if number in OF_DAMAGE:
        return
    if isinstance(error, OSError) and error.filename is not None:
        raise error
    raise OSError(number, os.strerror(number), str(path)) from error


def _number_of_hdf5(error: Exception) -> int | None:
    """h5py makes other errors than `OSError` of what fails while it looks for an object; the text keeps the number."""
    found = re.search(r"\(file read failed: .*\berrno = (\d+)", str(error), re.DOTALL)
    return int(found[1]) if found else None
