"""Whether what a file says it holds fits into memory; asked before it is read."""

from __future__ import annotations

import errno
import re
from pathlib import Path

MOST_PACKED = 1032
"""The most bytes that one byte of deflated data can hold; a file that claims more lies."""


def available() -> int | None:
    """Bytes that can be allocated, swap included; None where the system does not say."""
    try:
        found = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        return 1024 * (int(found["MemAvailable"]) + int(found["SwapFree"]))
    except (OSError, KeyError):
        return None


class Room:
    """The memory that is left for the arrays of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = available()

    def take(self, name: str, nbytes: int) -> None:
        """Set aside memory for an array.

        Raises:
            OSError: there is not as much; names the file.
        """
        if self._left is None:
            return
        if nbytes > self._left:
            problem = f"{name} takes {nbytes:,} bytes of memory, and {self._left:,} are left; free some"
            raise OSError(errno.ENOMEM, problem, str(self._path))
        self._left -= nbytes
