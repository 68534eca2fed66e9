"""Choose how a flow is integrated: the nearest entry of the table, fitted to the network and the number of rows.

An entry holds the fields of :class:`FlowPlan`, and the ``problem_rows``, ``width`` and ``precision`` ("highest", "high"
or "half") for which it was chosen. The nearest entry on a log scale is used, or a heuristic if there is none. Nothing
is tuned at run time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fdkernels.kernels.tuning.table import Entry, Gpu, nearest, remembers
from fdkernels.kernels.tuning.tiles import next_power_of_two


class Problem(NamedTuple):
    """A network, its rows, and the GPU that integrates them."""

    gpu: Gpu
    num_multiprocessors: int
    widths: tuple[int, ...]
    d: int
    normalised: bool
    """Whether the network has a layer norm."""
    precision: str
    """ "highest", "high" or "half"."""
    states: int
    num_samples: int
    """One model has states·num_samples rows. A fused kernel keeps the samples of a state together."""
    models: int


class FlowPlan(NamedTuple):
    """How a flow is integrated. An entry of the table has these fields.

    There are three implementations. Which one is fastest depends on the number of rows:

    ``stationary``  few rows: groups of programs keep the weights on the chip for the whole solve (``stationary.py``).
                    Needs hidden layers of one power-of-two width, no layer norm, and a GPU with cooperative launches.
    ``streamed``    every program reads all weights at every evaluation. Any network, any GPU.
    ``gemm``        many rows: cuBLAS multiplies, in one launch for each hidden layer; one more launch per evaluation
                    does the rest (``turn.py``). All launches form one CUDA graph. Any network, any GPU.
    """

    implementation: str
    rows: int
    """Rows that a program, or a group of programs, integrates at a time."""
    block_n: int
    """Outputs of a layer computed at a time (stationary: all of the program's columns)."""
    block_inputs: int
    """Inputs of a layer multiplied at a time."""
    num_stages: int
    num_warps: int
    split: int = 1
    """Programs in a group (stationary): as many as are needed to hold the weights."""


# Tiles that fit into the registers and the shared memory of every GPU.
FLOW_HEURISTICS = {
    "stationary": FlowPlan("stationary", rows=16, block_n=0, block_inputs=32, num_stages=1, num_warps=8),
    "streamed": FlowPlan("streamed", rows=16, block_n=64, block_inputs=32, num_stages=3, num_warps=8),
    "gemm": FlowPlan("gemm", rows=32, block_n=64, block_inputs=64, num_stages=2, num_warps=4),
}
MANY_ROWS = 8192  # enough to keep any GPU busy with one layer at a time
# Shared memory of a multiprocessor for weights, for the GPU families on which groups are launched. The interpreter gets
# little, so that it splits small networks too.
ON_CHIP_BYTES = {"sm_90": 200 * 1024, "cpu": 16 * 1024}
MAX_STATIONARY_D = 64  # more would not fit beside the weights
PROGRAMS_PER_SM = 4  # with more streamed programs, their scratch would not stay in the L2 cache


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@remembers
def flow_plan(problem: Problem, implementation: str | None, library: bool) -> FlowPlan:
    """The entry whose width and number of rows are nearest on a log scale, fitted to this network.

    Args:
        implementation: the one that the caller insists on, or None.
        library: whether "gemm" may be chosen if ``implementation`` is None.

    Raises:
        ValueError: the implementation insisted on cannot serve this network.
    """
    widest, rows = max(problem.widths), problem.states * problem.num_samples
    together = next_power_of_two(problem.num_samples)
    split, why_not = _split(problem)
    if implementation == "stationary" and why_not:
        raise ValueError(f"implementation='stationary' {why_not}; use implementation='streamed' or None")

    def serves(entry: Entry) -> bool:
        way = entry["implementation"]
        if entry["precision"] != problem.precision or way != (implementation or way):
            return False
        if way == "stationary":
            return not why_not and entry["rows"] >= together
        return way != "gemm" or library

    def distance(entry: Entry) -> float:
        return abs(math.log2(entry["problem_rows"] / rows)) + abs(math.log2(entry["width"] / widest))

    entry = nearest(problem.gpu, "flow", distance, serves)
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


MOST_LANES = 32  # with more, a program would hold more rows than the table's


def lanes(d: int) -> tuple[int, int]:
    """How a state and its d tangents become rows: so many, a power of two, and in so many chunks.

    Each chunk holds the state again, and as many tangents as there are rows left. Of all choices with the fewest rows
    this one has the fewest chunks.
    """
    choices = [(2**i, -(-d // (2**i - 1))) for i in range(1, MOST_LANES.bit_length())]
    return min(choices, key=lambda choice: (choice[0] * choice[1], choice[1]))


def _split(problem: Problem) -> tuple[int, str]:
    """The number of programs into which a stationary network is split, and the reason if it cannot be split."""
    widths, width, family = problem.widths, problem.widths[0], problem.gpu.family
    if family not in ON_CHIP_BYTES:
        return 1, f"is not for {family}"
    if problem.normalised or len(widths) < 2 or set(widths) != {width} or width != next_power_of_two(width):
        return 1, f"serves two or more hidden layers of one width, a power of two, without layer norm, got {widths}"
    if problem.precision == "highest":
        return 1, "has no room for the two parts of each weight that precision='highest' multiplies"
    if problem.d > MAX_STATIONARY_D:
        return 1, f"has no room for more than {MAX_STATIONARY_D} dimensions, got {problem.d}"
    needed = (len(widths) - 1) * width * width * (2 if problem.precision == "half" else 4)
    split = max(2, next_power_of_two(-(-needed // ON_CHIP_BYTES[family])))
    if width // split < 16:
        return 1, f"would split hidden layers of width {width} into {split}, fewer than 16 columns each"
    programs = split * problem.models
    if programs > problem.num_multiprocessors:
        return 1, f"needs {programs} multiprocessors for {problem.models} networks, got {problem.num_multiprocessors}"
    return split, ""
