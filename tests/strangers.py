"""What the tests of strangers' files share: little memory, and a folder outside of which nothing may change."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILES = [50, pytest.param(2_000, marks=pytest.mark.long("a minute"))]
"""Numbers of files to alter at random."""
ALLOWED = 512 << 20
"""Bytes of address space that reading a bad file may take, an import included."""


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Larger allocations fail, whether or not their memory is ever written to. The message of a refusal must not come
    from that."""
    (used,) = re.findall(r"^VmSize:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(used) + ALLOWED, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def damaged(path: Path, read: Callable[[], Any], refusal: type[Exception], files: int, reach: int | None = None) -> int:
    """Alter a file at random many times, in its first ``reach`` bytes, and read it: how many were refused.

    Any other exception than a refusal passes.
    """
    rng, whole, refused = np.random.default_rng(files), path.read_bytes(), 0
    with little_memory():
        for _ in range(files):
            content = bytearray(whole)
            for at in rng.integers(min(reach or len(whole), len(whole)), size=rng.integers(1, 5)):
                content[at] = rng.integers(256)
            path.unlink()  # the one before may still be mapped
            path.write_bytes(content)
            try:
                read()
            except refusal:
                refused += 1
    return refused
