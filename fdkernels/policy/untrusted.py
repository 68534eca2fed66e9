"""Files that a stranger may have made: what is asked before they are read, so that reading them is safe.

Nothing here executes what a file holds, and nothing is allocated for what a file merely claims to hold.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

LARGEST_JSON = 16 << 20
"""Bytes of JSON text that are parsed; objects in memory take up to thirty times as many."""
DEEPEST_JSON = 20
LARGEST_HEADER = 32 << 20
"""Bytes of a safetensors header, which names every tensor and holds the notes."""


class Refused(ValueError):
    """A file that is not what it should be, or would take more than it may; the message says why."""


def require_file(path: Path) -> int:
    """Refuse what is not a regular file: a pipe would never end, and a device may be endless. Returns its size."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"{path} is not a regular file")
    return found.st_size


def parse_json(text: str) -> Any:
    """The JSON in a text, if it is neither too large nor nested too deeply."""
    if len(text) > LARGEST_JSON:
        raise Refused(f"its JSON has more than {LARGEST_JSON >> 20} MiB")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise Refused("its JSON is nested too deeply") from error
    level = [found]
    for _ in range(DEEPEST_JSON):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return found
    raise Refused(f"its JSON is nested more than {DEEPEST_JSON} levels deep")


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file with a header too large to parse. Its library checks everything else in it."""
    size = require_file(path)
    with path.open("rb") as file:
        check_header(file.read(8), size, str(path))


def check_header(first: bytes, size: int, name: str = "it") -> None:
    """The same, given the first eight bytes of the file and its size."""
    header = int.from_bytes(first, "little")
    if header > min(size, LARGEST_HEADER):
        raise Refused(f"{name} has a header of {header:,} bytes and {size:,} bytes in all")


def require_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors with other names, shapes or types than those that they are to replace.

    Raises:
        ValueError: one is missing, too many or different.
    """
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"it {'lacks' if odd[0] in wanted else 'should not have'} {odd[0]:.100}")
    for name, tensor in found.items():
        ours = wanted[name]
        if tensor.shape != ours.shape or tensor.dtype != ours.dtype:
            theirs = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} is {theirs}, and {tuple(ours.shape)} {ours.dtype} would fit")
