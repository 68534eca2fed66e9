"""JSON that a stranger may have written, as records with values of the right types.

``fdkernels/policy/untrusted.py`` says what is asked of a file before it is read.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import typeguard

from fdkernels.policy.untrusted import LARGEST_JSON, Refused, parse_json, require_file

LONGEST_LIST = 1_000
"""Items of a list among settings."""
LONGEST_SHOWN = 300
Record = TypeVar("Record")


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, too large, or nested too deeply.
    """
    if require_file(path) > LARGEST_JSON:
        raise Refused(f"{path} has more than {LARGEST_JSON >> 20} MiB")
    return parse_json(path.read_text())


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
