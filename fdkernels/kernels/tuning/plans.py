"""How a flow is integrated: the table's nearest entry, fitted to the network and the number of rows.

An entry holds the fields of :class:`FlowPlan`, and the ``problem_rows``, ``width`` and ``precision`` ("highest", "high"
or "half") that it was chosen for. The nearest one in the logarithm is used, and a rule where there is none; nothing is
searched for at run time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fdkernels.kernels.tuning.table import Entry, Gpu, nearest, remembers
from fdkernels.kernels.tuning.tiles import next_power_of_two


class Problem(NamedTuple):
    """A network, its rows, and where they are integrated."""

    gpu: Gpu
    num_multiprocessors: int
    widths: tuple[int, ...]
    d: int
    normalised: bool
    """Whether there is a layer norm."""
    precision: str
    """ "highest", "high" or "half"."""
    states: int
    num_samples: int
    """The rows of one model; a fused kernel keeps a state's samples together."""
    models: int


class FlowPlan(NamedTuple):
    """How a flow is integrated; an entry of the table names these fields.

    There are three ways, and which one is the fastest depends on how many rows there are to keep the GPU busy with:

    ``stationary``  few rows: groups of programs keep the weights on the chip for the whole solve (``stationary.py``).
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
def flow_plan(problem: Problem, implementation: str | None, library: bool) -> FlowPlan:
    """The entry whose network and number of rows are nearest, in the logarithm, fitted to the network at hand.

    Args:
        implementation: insist on one.
        library: whether "gemm" may be chosen where nobody insists.

    Raises:
        ValueError: the one insisted on cannot serve this network.
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


def _split(problem: Problem) -> tuple[int, str]:
    """Into how many programs a stationary network is split, and why that cannot be."""
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
