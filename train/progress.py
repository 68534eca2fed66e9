"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

SELDOM = 60.0
"""Seconds between lines where there is no terminal."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, about {remaining} left, {rate_fmt}{postfix}"

_silent = False


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """Inside, nothing is shown."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


class _Lines:
    """A file in which each state of a bar is a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.file.write(f"{text}\n")

    def flush(self) -> None:
        self.file.flush()


def bar(iterable: Any = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A bar; or, where stderr is no terminal, a line a minute.

    Args:
        iterable: what to iterate over, if anything.
        shown: False: nothing.
        **options: tqdm's.
    """
    options["disable"] = _silent or not shown
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, dynamic_ncols=True, **options)
    seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), SELDOM)
    return tqdm(iterable, file=_Lines(sys.stderr), bar_format=LINE, **seldom, **options)
