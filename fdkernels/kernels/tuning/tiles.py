"""Choose the tile of a penalty or score program: the nearest entry of the table, fitted to the problem.

An entry holds ``tile_bytes``, ``num_warps`` and ``row_bytes``, the size of the padded row for which it was chosen. The
nearest entry on a log scale is used, or a heuristic if there is none. Nothing is tuned at run time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fdkernels.kernels.tuning.table import Gpu, nearest, remembers


class Config(NamedTuple):
    tile_bytes: int
    num_warps: int


class Tile(NamedTuple):
    """Constants of a penalty kernel, which handles ``rows`` × ``block_k`` × ``block_d`` padded elements at a time."""

    rows: int
    block_k: int
    block_d: int
    num_warps: int


# 32 bytes a thread: each makes at least one 16-byte load even if half of the padded tile is empty. That is far from
# using up the registers, and a small batch still fills several programs.
HEURISTIC = Config(tile_bytes=4096, num_warps=4)


def config(gpu: Gpu, kernel: str, row_bytes: int) -> Config:
    entry = nearest(gpu, kernel, lambda entry: abs(math.log2(entry["row_bytes"] / row_bytes)))
    return Config(entry["tile_bytes"], entry["num_warps"]) if entry else HEURISTIC


@remembers
def penalty_tile(gpu: Gpu, kernel: str, num_samples: int, d: int, itemsize: int) -> Tile:
    block_k, block_d = next_power_of_two(num_samples), next_power_of_two(d)
    tile_bytes, num_warps = config(gpu, kernel, block_k * block_d * itemsize)
    elements = tile_bytes // itemsize
    if block_k * block_d <= elements:
        return Tile(elements // (block_k * block_d), block_k, block_d, num_warps)
    # A row that does not fit is read in blocks of K. A wide d gets more threads, not more registers.
    return Tile(1, max(1, elements // block_d), block_d, max(num_warps, min(16, block_d // 128)))


@remembers
def score_block(gpu: Gpu, itemsize: int) -> tuple[int, int]:
    tile_bytes, num_warps = config(gpu, "score", 1)
    return tile_bytes // itemsize, num_warps


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
