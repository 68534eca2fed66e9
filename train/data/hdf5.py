"""Arrays of an HDF5 file, read only if they lie in that file and as large as they say.

HDF5 can do more than hold numbers: links and arrays may lead into other files, an array of any size may take no space
at all, and filters may be plug-ins or unpack without end.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5o, h5z

from fdkernels.policy.untrusted import Refused, require_file
from train.data.room import MOST_PACKED, Room

FILTERS = (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32)
"""What data may be passed through, each at most once and in this order."""
LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
SMALL_CHUNK = 1 << 20
"""Chunks up to this many bytes may be larger than their array."""


class Arrays:
    """Groups and arrays of one file.

    Every array must take as much of the file as it is large, or could be unpacked from it; no two may share it.
    """

    def __init__(self, file: h5py.File, size: int) -> None:
        self.file = file
        self._stored, self._room = size, Room(Path(file.filename))

    def find(self, parent: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
        """The group or array of that name.

        Raises:
            ValueError: there is none, or not in this place alone.
        """
        where = f"{parent.name.rstrip('/')}/{name}"
        link = parent.get(name, getlink=True)  # asked first, because everything else follows links
        if link is None:
            raise ValueError(f"it lacks {where}")
        if not isinstance(link, h5py.HardLink):
            raise Refused(f"{where} is a link, which may lead anywhere")
        found = parent[name]
        if h5o.get_info(found.id).rc != 1:
            raise Refused(f"{where} has several names")
        return found

    def array(self, parent: h5py.Group, name: str) -> np.ndarray:
        """The array of numbers of that name.

        Raises:
            ValueError: there is none; or it is not numbers, not in this file, or not as large as it says.
            OSError: there is no memory for it (ENOMEM).
        """
        found = self.find(parent, name)
        if not isinstance(found, h5py.Dataset) or found.shape is None or found.dtype.kind not in "biuf":
            raise Refused(f"{found.name} is not an array of numbers")
        size = math.prod(found.shape) * found.dtype.itemsize
        self._check_storage(found, size)
        self._room.take(found.name, size)
        return found[()]

    def _check_storage(self, found: h5py.Dataset, size: int) -> None:
        properties, stored = found.id.get_create_plist(), found.id.get_storage_size()
        if properties.get_layout() not in LAYOUTS or found.external:
            raise Refused(f"{found.name} has its numbers in another file")
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if filters != [known for known in FILTERS if known in filters]:
            raise Refused(f"{found.name} is packed in a way that is not read here; h5repack -f NONE unpacks it")
        packed = h5z.FILTER_DEFLATE in filters
        if size > stored * (MOST_PACKED if packed else 1):
            raise Refused(f"{found.name} cannot have {size:,} bytes in {stored:,}")
        if found.chunks and chunk_size(found) > max(size, SMALL_CHUNK):
            raise Refused(f"{found.name} has chunks {found.chunks} and the shape {found.shape}")
        if stored > self._stored:
            raise Refused(f"{found.name} shares its bytes with other arrays, for the file has fewer")
        self._stored -= stored
        if packed:
            _check_chunks(found, filters)


def chunk_size(found: h5py.Dataset) -> int:
    return math.prod(found.chunks) * found.dtype.itemsize


def _check_chunks(found: h5py.Dataset, filters: Sequence[int]) -> None:
    """Refuse chunks that unpack to more or less than a chunk: HDF5 would go on to their end."""
    size = chunk_size(found)
    for i in range(found.id.get_num_chunks()):
        info = found.id.get_chunk_info(i)
        if info.size > size + size // 1000 + 64:  # deflate adds at most this
            raise Refused(f"{found.name} has a chunk of {info.size:,} bytes for {size:,}")
        skipped, content = found.id.read_direct_chunk(info.chunk_offset)
        passed = [known for at, known in enumerate(filters) if not skipped >> at & 1]
        if h5z.FILTER_DEFLATE in passed:
            unpacked = len(zlib.decompressobj().decompress(content, size + 1))
        else:
            unpacked = len(content) - (4 if h5z.FILTER_FLETCHER32 in passed else 0)
        if unpacked != size:
            raise Refused(f"{found.name} has a chunk that does not unpack to its {size:,} bytes")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Arrays]:
    """The arrays of a file.

    Raises:
        OSError, ValueError: the file is damaged, or not one of HDF5.
    """
    size = require_file(path)
    with h5py.File(path, "r") as file:
        yield Arrays(file, size)
