"""Ctrl-C and SIGTERM, which stop a command in good order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def handle_stops(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have this handler called at SIGINT and SIGTERM; returns the handlers before.

    Signals that this process was started to ignore stay ignored, as Ctrl-C is by what a shell script runs with ``&``.
    """
    heeded = (s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN)
    return {signum: signal.signal(signum, handler) for signum in heeded}
