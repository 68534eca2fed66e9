"""How large a program's tile is: a table per GPU family, and a rule for the families it does not have.

``configs.json`` maps family -> kernel -> list of entries. An entry holds ``row_bytes`` (of the padded row it was chosen
for), ``tile_bytes``, ``num_warps`` and ``source`` (what the choice rests on). The entry nearest to the row at hand, in
the logarithm, is used; nothing is searched for at run time. ``python benchmarks/tune.py`` measures the candidates on a
GPU and writes its family's entries.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE_FILE = Path(__file__).with_name("configs.json")
TABLE: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE_FILE.read_text())
MAX_D = 8192  # δ and the gradient to it stay in registers


class Config(NamedTuple):
    tile_bytes: int
    num_warps: int


class Tile(NamedTuple):
    """Constants of a penalty kernel: ``rows`` × ``block_k`` × ``block_d`` padded elements at a time."""

    rows: int
    block_k: int
    block_d: int
    num_warps: int


# 32 bytes a thread: at least one 16-byte load in each, though up to half of a padded tile holds nothing; far from the
# end of the registers; and still several programs where a batch is small.
HEURISTIC = Config(tile_bytes=4096, num_warps=4)


@functools.cache
def gpu_family(device: torch.device) -> str:
    """sm_90, gfx942, ...; "cpu" under the interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def config(family: str, kernel: str, row_bytes: int) -> Config:
    entries = TABLE.get(family, {}).get(kernel, [])
    nearest = min(entries, key=lambda entry: abs(math.log2(entry["row_bytes"] / row_bytes)), default=None)
    return Config(nearest["tile_bytes"], nearest["num_warps"]) if nearest else HEURISTIC


@functools.cache
def penalty_tile(family: str, kernel: str, num_samples: int, d: int, itemsize: int) -> Tile:
    if d > MAX_D:
        raise ValueError(f"the Triton kernels serve d up to {MAX_D}, got {d}; use backend='torch'")
    block_k, block_d = next_power_of_two(num_samples), next_power_of_two(d)
    tile_bytes, num_warps = config(family, kernel, block_k * block_d * itemsize)
    elements = tile_bytes // itemsize
    if block_k * block_d <= elements:
        return Tile(elements // (block_k * block_d), block_k, block_d, num_warps)
    # A row that does not fit is walked over in blocks of K; a wide d asks for more threads, not for more registers.
    return Tile(1, max(1, elements // block_d), block_d, max(num_warps, min(16, block_d // 128)))


@functools.cache
def score_block(family: str, itemsize: int) -> tuple[int, int]:
    tile_bytes, num_warps = config(family, "score", 1)
    return tile_bytes // itemsize, num_warps


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
