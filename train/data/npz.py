"""Arrays of .npz files, read only if the archive really has as many bytes as their headers say.

`numpy.load` allocates an array of the shape in its header before it reads any of it.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from fdkernels.policy.untrusted import Refused, require_file
from train.data.room import MOST_PACKED, Room

LARGEST_READ = 4 << 20
LONGEST_HEADER = 10_000
"""NumPy's own limit, which it asks about only after reading the header."""
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What NumPy writes. LZMA would allocate a dictionary of the size that the archive asks for."""
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    length: int
    """Bytes of the header."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Bounded(io.BufferedReader):
    """A file that is not read all at once: the archive itself says how large its directory is."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(LARGEST_READ + 1 if size is None or size < 0 else min(size, LARGEST_READ + 1))
        if len(content) > LARGEST_READ:
            raise Refused("the archive's directory is too large")
        return content


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with its directory read.

    Raises:
        OSError, zipfile.BadZipFile, ValueError: the archive is damaged, or not one.
    """
    require_file(path)
    with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        yield archive


def member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The array's entry in the directory.

    Raises:
        ValueError: there is none or more than one, or it claims more than can be packed into it.
    """
    found = [entry for entry in archive.infolist() if entry.filename == f"{name}.npy"]
    if len(found) != 1:
        raise ValueError(f"it lacks {name}" if not found else f"it has {name} {len(found)} times")
    (entry,) = found
    if entry.compress_type not in PACKINGS or entry.flag_bits & 1:
        raise Refused(f"{name} is encrypted, or packed otherwise than by NumPy")
    # the arrays end where the directory begins
    stored = min(entry.compress_size, archive.start_dir - entry.header_offset)
    if entry.file_size > stored * (MOST_PACKED if entry.compress_type == zipfile.ZIP_DEFLATED else 1):
        raise Refused(f"{name} cannot have {entry.file_size:,} bytes in {stored:,}")
    return entry


def header_of(file: IO[bytes], name: str) -> Header:
    """The header of an array, from the beginning of its file.

    Raises:
        ValueError: there is no such header, or its array has no plain numbers.
    """
    version = npy.read_magic(file)
    if version not in READERS:
        raise Refused(f"{name} has a header of version {version}")
    field = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(field, "little")
    if length > LONGEST_HEADER:
        raise Refused(f"{name} has a header of {length:,} bytes")
    try:
        shape, _, dtype = READERS[version](io.BytesIO(field + file.read(length)))
    except Exception as error:  # from the parsers of Python's literals and tokens
        raise Refused(f"{name} has no header of an array ({type(error).__name__}: {error!s:.200})") from error
    if dtype.kind not in "biuf":
        raise Refused(f"{name} has {dtype}, not numbers; nothing is unpickled (allow_pickle=False)")
    if any(side < 0 for side in shape):
        raise Refused(f"{name} has the shape {shape}")
    return Header(shape, dtype, npy.MAGIC_LEN + len(field) + length)


def header(archive: zipfile.ZipFile, name: str) -> Header:
    """The header of an array of an archive that has exactly as many bytes as it says.

    Raises:
        ValueError: there is no such array, or it has more or fewer bytes.
    """
    entry = member(archive, name)
    with archive.open(entry) as file:
        found = header_of(file, name)
    if found.length + found.nbytes != entry.file_size:
        raise Refused(f"{name} has the shape {found.shape} of {found.dtype} in {entry.file_size:,} bytes")
    return found


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the arrays that the archive has.

    Raises:
        OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError: the archive is damaged.
        OSError: there is no memory for an array (ENOMEM).
        ValueError: an array is not what its header says.
    """
    with opened(path) as archive:
        entries = set(archive.namelist())
        there = [name for name in names if f"{name}.npy" in entries]
        room = Room(path)
        for name in there:
            room.take(name, header(archive, name).nbytes)
        arrays = {}
        for name in there:
            with archive.open(member(archive, name)) as file:
                arrays[name] = npy.read_array(file, allow_pickle=False, max_header_size=LONGEST_HEADER)
        return arrays
