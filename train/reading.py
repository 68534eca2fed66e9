"""Files that a stranger may have made: what is asked before they are read, so that reading them is safe.

Nothing here executes what a file holds, and nothing is allocated for what a file merely claims to hold.
"""

from __future__ import annotations

import json
import stat
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import typeguard

LARGEST_JSON = 16 << 20
"""Bytes of JSON text that are parsed; objects in memory take up to thirty times as many."""
DEEPEST_JSON = 20
LONGEST_LIST = 1_000
"""Items of a list among settings."""
LONGEST_SHOWN = 300
LARGEST_HEADER = 32 << 20
"""Bytes of a safetensors header, which names every tensor and holds the notes."""

Record = TypeVar("Record")


class Refused(ValueError):
    """A file that is not what it should be, or would take more than it may; the message says why."""


def require_file(path: Path) -> int:
    """Refuse what is not a regular file: a pipe would never end, and a device may be endless. Returns its size."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"{path} is not a regular file")
    return found.st_size


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, too large, or nested too deeply.
    """
    if require_file(path) > LARGEST_JSON:
        raise Refused(f"{path} has more than {LARGEST_JSON >> 20} MiB")
    return parse_json(path.read_text())


def parse_json(text: str) -> Any:
    """The JSON in a text, within the limits of `read_json`."""
    if len(text) > LARGEST_JSON:
        raise Refused(f"its JSON has more than {LARGEST_JSON >> 20} MiB")
    try:
        found = level = json.loads(text)
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


def record_from_json(kind: type[Record], values: Any) -> Record:
    """A dataclass from a JSON object. Lists become tuples; every value must have the type of its field.

    Raises:
        TypeError, ValueError: a value has another type, or the dataclass refuses it.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__} is a {type(values).__name__}")
    for name, value in values.items():
        if isinstance(value, list) and len(value) > LONGEST_LIST:
            raise Refused(f"{name} has {len(value):,} items")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, wanted in typing.get_type_hints(kind).items():
        if name in given:
            require_type(name, given[name], wanted)
    return kind(**given)


def require_type(name: str, value: Any, wanted: Any) -> None:
    """Refuse a value that is not of that type, all of its items included.

    Raises:
        TypeError: it is not.
    """
    try:
        typeguard.check_type(value, wanted, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError as error:
        raise TypeError(f"{name}: {error}") from error


def shown(value: object) -> str:
    """A value from a file, for display: without what would move a terminal's cursor, and no longer than a few lines."""
    text = str(value)
    return text if text.isprintable() and len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]!r}..."


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file with a header too large to parse. Its library checks everything else in it."""
    size = require_file(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, LARGEST_HEADER):
        raise Refused(f"{path} has a header of {header:,} bytes and {size:,} bytes in all")
