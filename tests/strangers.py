"""What the tests of strangers' files share: little memory, and a folder outside of which nothing may change."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

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
