"""Files that are written whole or not at all, and files that grow by whole rows."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    write_whole(path, save(tensors, metadata=header))


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears under its name only once it is safely on disk.

    If that fails, nothing is left of it. A process that is killed leaves ``NAME.partial``; see `remove_partial`.

    Raises:
        OSError: names ``path``.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        try:
            partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which must not be followed
            with partial.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()  # or the end of it would be written only after the fsync
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()  # it would hold the space that was lacking
            raise
        sync_folder(path.parent)


def create_folder(folder: Path, *, parents: bool = True) -> None:
    """Create a folder, and its parents unless told otherwise, safely on disk; one that is there is left as it is."""
    if folder.is_dir():
        return
    if parents:
        create_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: a file's own fsync does not reach them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Put all files in a folder, and in folders in it, safely on disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove_partial(folder: Path, *names: str) -> None:
    """Delete what killed processes left unfinished in this folder, of files of these names or patterns."""
    for path in [path for name in names for path in folder.glob(f"{name}.partial")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system name this file. For a full disk it names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


class GrowingFile:
    """A file that begins with ``content`` and grows by whole rows.

    A row that does not fit on the disk is taken back. A process that is killed may leave the beginning of one.

    Raises:
        OSError: also from the methods; names ``path``.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        write_whole(path, content)
        # Not buffered: Python would keep a row that could not be written, and fail with it once more on closing.
        self._file = path.open("ab", buffering=0)
        self._size = len(content)

    def add(self, row: bytes) -> None:
        """Append a row; the operating system has it when this returns."""
        with naming(self.path):
            self._check_that_it_is_there()
            written = 0
            try:
                while written < len(row):
                    written += os.write(self._file.fileno(), row[written:])
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
            self._size += len(row)

    def sync(self) -> None:
        """Put all rows safely on disk."""
        with naming(self.path):
            self._check_that_it_is_there()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _check_that_it_is_there(self) -> None:
        """A file that was deleted or moved can still be written to, and nobody would find what it gets."""
        if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise FileNotFoundError(errno.ENOENT, "another file has taken its place", str(self.path))
