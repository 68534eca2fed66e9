"""How large a program's tile is, and how a flow is integrated: the table's nearest entry, fitted to the problem.

For the penalty and the score, an entry of the table holds ``row_bytes`` (of the padded row it was chosen for),
``tile_bytes`` and ``num_warps``; for the flow, the fields of :class:`FlowPlan`, and the ``problem_rows``, ``width`` and
``precision`` ("highest", "high" or "half") it was chosen for. The entry nearest to the problem at hand, in the
logarithm, is used, and a rule where there is none; nothing is searched for at run time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fdkernels.kernels.table import Entry, Gpu, nearest, remembers

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


def config(gpu: Gpu, kernel: str, row_bytes: int) -> Config:
    entry = nearest(gpu, kernel, lambda entry: abs(math.log2(entry["row_bytes"] / row_bytes)))
    return Config(entry["tile_bytes"], entry["num_warps"]) if entry else HEURISTIC


@remembers
def penalty_tile(gpu: Gpu, kernel: str, num_samples: int, d: int, itemsize: int) -> Tile:
    if d > MAX_D:
        raise ValueError(f"the Triton kernels serve d up to {MAX_D}, got {d}; use backend='torch'")
    block_k, block_d = next_power_of_two(num_samples), next_power_of_two(d)
    tile_bytes, num_warps = config(gpu, kernel, block_k * block_d * itemsize)
    elements = tile_bytes // itemsize
    if block_k * block_d <= elements:
        return Tile(elements // (block_k * block_d), block_k, block_d, num_warps)
    # A row that does not fit is walked over in blocks of K; a wide d asks for more threads, not for more registers.
    return Tile(1, max(1, elements // block_d), block_d, max(num_warps, min(16, block_d // 128)))


@remembers
def score_block(gpu: Gpu, itemsize: int) -> tuple[int, int]:
    tile_bytes, num_warps = config(gpu, "score", 1)
    return tile_bytes // itemsize, num_warps


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class FlowPlan(NamedTuple):
    """How a flow is integrated; an entry of the table names these fields.

    There are three ways, and which one is the fastest depends on how many rows there are to keep the GPU busy with:

    ``stationary``  few rows: groups of programs keep the weights on the chip for the whole solve (``networks.py``).
                    Hidden layers of one width, a power of two, without layer norm; a GPU that can launch cooperatively.
    ``streamed``    every program reads all weights at every evaluation. Any network, any GPU.
    ``gemm``        many rows: cuBLAS multiplies, a launch for each hidden layer and one for what is between them
                    (``turn.py``), all of them a CUDA graph. Any network, any GPU.
    """

    implementation: str
    rows: int
    """Rows that a program, or group, integrates at a time."""
    block_n: int
    """Outputs of a layer computed at a time (stationary: all that the program has)."""
    block_inputs: int
    """Inputs of a layer multiplied at a time."""
    num_stages: int
    num_warps: int
    split: int = 1
    """Programs in a group (stationary): as many as it takes to hold the weights."""


# A tile that every GPU has the registers and the shared memory for.
FLOW_HEURISTICS = {
    "stationary": FlowPlan("stationary", rows=16, block_n=0, block_inputs=32, num_stages=1, num_warps=8),
    "streamed": FlowPlan("streamed", rows=16, block_n=64, block_inputs=32, num_stages=3, num_warps=8),
    "gemm": FlowPlan("gemm", rows=32, block_n=64, block_inputs=64, num_stages=2, num_warps=4),
}
MANY_ROWS = 8192  # keep any GPU busy with one layer at a time
# Shared memory for weights, of a multiprocessor, where groups are launched at all; little in the interpreter, so that
# small networks are split as well.
ON_CHIP_BYTES = {"sm_90": 200 * 1024, "cpu": 16 * 1024}
MAX_STATIONARY_D = 64  # beside the weights
PROGRAMS_PER_SM = 4  # streamed programs beyond that take turns, so that their scratch stays in the L2 cache


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@remembers
def flow_plan(
    gpu: Gpu,
    num_multiprocessors: int,
    widths: tuple[int, ...],
    d: int,
    normalised: bool,
    precision: str,
    states: int,
    num_samples: int,
    models: int,
    implementation: str | None,
    library: bool,
) -> FlowPlan:
    """The entry whose network and number of rows are nearest, in the logarithm, fitted to the network at hand.

    Args:
        precision: "highest", "high" or "half".
        states, num_samples: the rows of one model; a fused kernel keeps a state's samples together.
        implementation: insist on one.
        library: whether "gemm" may be chosen where nobody insists.

    Raises:
        ValueError: the one insisted on cannot serve this network.
    """
    widest, rows, together = max(widths), states * num_samples, next_power_of_two(num_samples)
    split, why_not = _split(gpu.family, num_multiprocessors, widths, d, normalised, precision, models)
    if implementation == "stationary" and why_not:
        raise ValueError(f"implementation='stationary' {why_not}; use implementation='streamed' or None")

    def serves(entry: Entry) -> bool:
        way = entry["implementation"]
        if entry["precision"] != precision or way != (implementation or way):
            return False
        if way == "stationary":
            return not why_not and entry["rows"] >= together
        return way != "gemm" or library

    def distance(entry: Entry) -> float:
        return abs(math.log2(entry["problem_rows"] / rows)) + abs(math.log2(entry["width"] / widest))

    entry = nearest(gpu, "flow", distance, serves)
    if entry:
        plan = FlowPlan(**{name: entry[name] for name in FlowPlan._fields if name in entry})
    else:
        plan = FLOW_HEURISTICS[implementation or ("gemm" if library and rows >= MANY_ROWS else "streamed")]
    fit = max(16, next_power_of_two(widest))
    plan = plan._replace(block_n=min(plan.block_n, fit), block_inputs=min(plan.block_inputs, fit))
    if plan.implementation == "gemm":
        return plan
    plan = plan._replace(rows=max(plan.rows, together))
    return plan if plan.implementation == "streamed" else plan._replace(split=split, block_n=widest // split)


def _split(
    family: str,
    num_multiprocessors: int,
    widths: tuple[int, ...],
    d: int,
    normalised: bool,
    precision: str,
    models: int,
) -> tuple[int, str]:
    """Into how many programs a stationary network is split, and why that cannot be."""
    width = widths[0]
    if family not in ON_CHIP_BYTES:
        return 1, f"is not for {family}"
    if normalised or len(widths) < 2 or set(widths) != {width} or width != next_power_of_two(width):
        return 1, f"serves two or more hidden layers of one width, a power of two, without layer norm, got {widths}"
    if precision == "highest":
        return 1, "has no room for the two parts of each weight that precision='highest' multiplies"
    if d > MAX_STATIONARY_D:
        return 1, f"has no room for more than {MAX_STATIONARY_D} dimensions, got {d}"
    needed = (len(widths) - 1) * width * width * (2 if precision == "half" else 4)
    split = max(2, next_power_of_two(-(-needed // ON_CHIP_BYTES[family])))
    if width // split < 16:
        return 1, f"would split hidden layers of width {width} into {split}, fewer than 16 columns each"
    if split * models > num_multiprocessors:
        return 1, f"needs {split * models} multiprocessors for {models} networks, got {num_multiprocessors}"
    return split, ""
