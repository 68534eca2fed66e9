"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    write_whole(path, save(tensors, metadata=header))


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears under its name only once it is safely on disk."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which must not be followed
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        os.fsync(file.fileno())
    partial.replace(path)
