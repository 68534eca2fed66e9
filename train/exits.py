"""The exit codes of all commands; docs/commands/exit-codes.md explains them."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    """A part of the work failed, and the output says which; or the program has an error, and there is a traceback."""
    REFUSED = 2
    """The options, the data, a file or the machine do not allow it; stderr says why."""
    DIVERGED = 3
    """The numbers of a run went wrong."""
    STOPPED = 130
    """By Ctrl-C or SIGTERM, in good order."""
    UNREAD = 141
    """Whatever read the output has gone, such as ``head``."""
