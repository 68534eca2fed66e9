"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from fdkernels.policy.untrusted import require_file


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name once it is safely on disk, in place of one that is there.

    A process that is killed may leave ``.policy-*.partial`` in the folder.

    Raises:
        ValueError: the path is no regular file.
        OSError: the file cannot be written.
    """
    if path.exists():
        require_file(path)  # a device would be replaced
    partial = path.with_name(f".policy-{secrets.token_hex(8)}.partial")  # its own, because others may save there too
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()  # or the end of it would be written only after the fsync
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
