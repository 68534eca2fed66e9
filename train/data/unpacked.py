"""One array of an .npz file that need not fit in memory: unpacked beside the file once, then mapped from there."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from filelock import FileLock

from fdkernels.policy.untrusted import Refused
from train.data import npz
from train.outputs.files import sync_folder

CHUNK = 1 << 20


def mapped(archive: Path, name: str) -> np.ndarray:
    """The array of that name, read-only. Pages of it are read as they are used, and the system may drop them again.

    It is unpacked into ``ARCHIVE.NAME.npy`` in the same folder, which later calls reuse as long as it is whole and no
    older than the archive.

    Raises:
        ValueError: there is no such array, or it consists of Python objects.
        OSError, zipfile.BadZipFile, EOFError: the archive is damaged, or the disk has no room for it.
    """
    unpacked = archive.with_name(f"{archive.stem}.{name}.npy")
    with npz.opened(archive) as file:
        header, member = npz.header(file, name), npz.member(file, name)
        if not _is_whole(unpacked, archive, member):  # asked first, because a folder may be read-only
            with FileLock(archive.with_name(f".{unpacked.name}.lock")):
                if not _is_whole(unpacked, archive, member):
                    _unpack(file, member, unpacked)
    with unpacked.open("rb") as plain:  # it may have come with the archive, and hold something else
        if npz.header_of(plain, name) != header:
            raise Refused(f"{unpacked} has another array than {archive}")
    # Read-only, because Linux reserves memory for the whole of a file that is mapped for writing into private copies.
    return np.load(unpacked, mmap_mode="r", allow_pickle=False)


def _unpack(file: zipfile.ZipFile, member: zipfile.ZipInfo, unpacked: Path) -> None:
    partial = unpacked.with_name(unpacked.name + ".partial")
    free = shutil.disk_usage(unpacked.parent).free
    if member.file_size > free:
        raise OSError(errno.ENOSPC, f"it takes {member.file_size:,} bytes, and {free:,} are free", str(unpacked))
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which must not be followed
        # the end of the member is reached, and its checksum is therefore tested, before it gets its name
        with file.open(member) as packed, partial.open("xb") as target:
            shutil.copyfileobj(packed, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        partial.replace(unpacked)
        sync_folder(unpacked.parent)
    finally:
        partial.unlink(missing_ok=True)


def _is_whole(unpacked: Path, archive: Path, member: zipfile.ZipInfo) -> bool:
    if unpacked.is_symlink() or not unpacked.is_file():
        return False
    found = unpacked.stat()
    return found.st_size == member.file_size and found.st_mtime >= archive.stat().st_mtime
