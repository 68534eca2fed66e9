"""The best settings for each GPU: a table that ships with the library, and a table of the user's.

Both map a GPU -> kernel -> list of entries. An entry holds a problem, the settings that were best for it, and in
``source`` where they come from. The shipped table lists GPUs by family. ``python -m fdkernels.tune`` measures the
current GPU and adds it by name to the user's table, which takes precedence.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

Entry = dict[str, Any]
SHIPPED_FILE = Path(__file__).with_name("shipped.json")
LARGEST = 16 << 20
"""Bytes of a table."""
LARGEST_NUMBER = 1 << 40
NAMES = ("implementation", "precision", "source")
"""The fields of an entry that are text; all others are whole numbers."""
PROBLEM = ("row_bytes", "precision", "problem_rows", "width")
"""The fields of an entry that describe its problem."""


class Gpu(NamedTuple):
    name: str
    family: str
    """sm_90, gfx942, ...; "cpu" under the interpreter."""


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return Gpu("", "cpu")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Gpu(properties.name, properties.gcnArchName.split(":")[0])
    return Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


def user_file() -> Path:
    """$FDKERNELS_CONFIGS, or a file in the user's cache."""
    if given := os.environ.get("FDKERNELS_CONFIGS"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fdkernels" / "configs.json"


def read(file: Path) -> dict[str, dict[str, list[Entry]]]:
    """The table in a file; empty if there is no file or this process cannot read it."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return {}
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        table = json.loads(file.read_text())
        _check(table)
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{file} is no table of fdkernels ({error}): delete it") from error
    return table


def _check(table: Any) -> None:
    """Refuse what is no table, and numbers that no kernel could be compiled with."""
    if not isinstance(table, dict) or not all(isinstance(kernels, dict) for kernels in table.values()):
        raise ValueError("it maps no GPUs to kernels")
    for entries in (entries for kernels in table.values() for entries in kernels.values()):
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("a kernel has no list of entries")
        for name, value in ((name, value) for entry in entries for name, value in entry.items()):
            if name in NAMES:
                fits = isinstance(value, str)
            else:
                fits = type(value) is int and (0 if name == "block_n" else 1) <= value <= LARGEST_NUMBER
            if not fits:
                raise ValueError(f"{name:.40} is {value!r:.40}")


TABLE = read(SHIPPED_FILE) | read(user_file())


def nearest(
    gpu: Gpu, kernel: str, distance: Callable[[Entry], float], serves: Callable[[Entry], bool] = lambda entry: True
) -> Entry | None:
    """The nearest entry that serves: one for this GPU by name or, if there is none, one for its family."""
    for key in gpu:
        choices = filter(serves, TABLE.get(key, {}).get(kernel, []))
        if found := min(choices, key=distance, default=None):
            return found
    return None


@contextlib.contextmanager
def only(gpu: Gpu, kernel: str, entry: Entry) -> Iterator[None]:
    """Use this one entry, and heuristics for everything else."""
    before = dict(TABLE)
    _replace({gpu.family: {kernel: [entry]}})
    try:
        yield
    finally:
        _replace(before)


def _replace(contents: dict[str, dict[str, list[Entry]]]) -> None:
    TABLE.clear()
    TABLE.update(contents)
    for function in _read_once:
        function.cache_clear()


_read_once: list[Any] = []


def remembers(function: Callable) -> Any:
    """Cache a function of the table, which every launch calls. A change of the table clears the cache."""
    cached = functools.cache(function)
    _read_once.append(cached)
    return cached


def write(file: Path, key: str, found: dict[str, list[Entry]]) -> None:
    """Add entries for a GPU or a family. They replace earlier entries for the same problems; all others stay."""
    table = read(file)
    kernels = table.setdefault(key, {})
    for kernel, new in found.items():
        problems = [_problem(entry) for entry in new]
        kernels[kernel] = [entry for entry in kernels.get(kernel, []) if _problem(entry) not in problems] + new
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".new")
    whole.unlink(missing_ok=True)  # of a process that was killed; or a link, which must not be followed
    with whole.open("x") as target:
        target.write(json.dumps(table, indent=2) + "\n")
    whole.replace(file)


def _problem(entry: Entry) -> list[Any]:
    return [entry.get(field) for field in PROBLEM]
