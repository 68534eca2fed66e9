"""Explicit Runge-Kutta methods as data, a solver that uses one, and the loop that steps along its times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdkernels.backend import autocast
from fdkernels.paths import AffinePath, PathName, data_time, resolve_path
from fdkernels.torch_private import transforms_active
from fdkernels.validation import (
    MAX_COUNT,
    as_float,
    brief,
    check_bounds,
    check_choice,
    check_count,
    check_flag,
    is_sequence,
)

Method = Literal["euler", "midpoint", "heun", "rk4"]
MAX_TIME = 1e4
"""Times beyond this are treated as a mistake; float16 holds them, and the steps between them."""
Field: TypeAlias = Callable[[Tensor, float | Tensor], Tensor]  # v(x, t) for a fixed condition


class Stage(NamedTuple):
    """One evaluation of the velocity within a step of size h from x at time t.

    Stage j evaluates k_j = v(z_j, t + at_j·h), where z_1 = x and z_{j+1} = x + reach_j·h·k_j. The step ends at
    x + Σ_j weight_j·h·k_j. A method in which a stage needs more than the one before it does not fit this form.
    """

    at: float
    reach: float
    weight: float


METHODS: dict[str, tuple[Stage, ...]] = {
    "euler": (Stage(0.0, 0.0, 1.0),),
    "midpoint": (Stage(0.0, 0.5, 0.0), Stage(0.5, 0.0, 1.0)),
    "heun": (Stage(0.0, 1.0, 0.5), Stage(1.0, 0.0, 0.5)),
    "rk4": (Stage(0.0, 0.5, 1 / 6), Stage(0.5, 0.5, 1 / 3), Stage(0.5, 1.0, 1 / 3), Stage(1.0, 0.0, 1 / 6)),
}


class Solver(NamedTuple):
    """A solver's settings. The flow's operators take these fields as they are."""

    times: list[float]
    """S + 1 of them. If empty, the given rows are ends of the flow already, and nothing is integrated."""
    method: str
    low: float
    high: float
    clip: str
    """When the state is clipped to [low, high]: at the "end", at every "step" or "never"."""


def check_solver(
    op: str,
    num_steps: int,
    time_grid: Sequence[float] | Tensor | None,
    method: Method,
    clip: tuple[float, float] | None,
    clip_each_step: bool,
    path: PathName | AffinePath,
    integrates: bool = True,
) -> Solver:
    """The solver that these arguments of a public function describe.

    Args:
        integrates: False leaves the solver without times, so that the path needs no direction.
    """
    resolved = resolve_path(op, path)
    check_choice(op, "method", method, METHODS)
    check_flag(op, "clip_each_step", clip_each_step)
    if clip is None and clip_each_step:
        raise ValueError(f"{op}: clip_each_step needs bounds, got clip=None")
    low, high = (0.0, 0.0) if clip is None else check_bounds(op, "clip", clip)
    when = "never" if clip is None else "step" if clip_each_step else "end"
    return Solver(_check_times(op, num_steps, time_grid, resolved if integrates else None), method, low, high, when)


def _check_times(
    op: str, num_steps: int, time_grid: Sequence[float] | Tensor | None, path: AffinePath | None
) -> list[float]:
    """The S + 1 times: those of ``time_grid``, or i/S from the path's noise to its data; none without a path."""
    if time_grid is None:
        num_steps = check_count(op, "num_steps", num_steps)
        if path is None:
            return []
        times = [i / num_steps for i in range(num_steps + 1)]
        return times if data_time(op, path) == 1 else times[::-1]
    listed = _on_host(time_grid)
    if not is_sequence(listed):
        raise TypeError(f"{op}: time_grid must be a sequence of times, got {type(time_grid).__name__}")
    times = [as_float(_on_host(t)) for t in itertools.islice(listed, MAX_COUNT + 2)]
    if not 2 <= len(times) <= MAX_COUNT + 1 or not all(-MAX_TIME <= t <= MAX_TIME for t in times):
        raise ValueError(
            f"{op}: time_grid must hold two or more times, at most {MAX_COUNT + 1}, between {-MAX_TIME:g} and "
            f"{MAX_TIME:g}, got {brief(time_grid)}"
        )
    return [] if path is None else times


def _on_host(value: Any) -> Any:
    """What a tensor or an array holds as Python has it, None where that cannot be read; anything else as it is."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    try:
        return value.tolist()
    except (RuntimeError, TypeError):  # nested, sparse, without data, ...
        return None


def integrate(field: Field, x: Tensor, solver: Solver, return_path: bool = False) -> Tensor:
    """Integrate the field from x. Autograd keeps only x of each step; the rest is computed again.

    ``torch.func`` transforms do not support checkpointing, so autograd takes its usual memory under them.
    """
    stages = METHODS[solver.method]
    forget = torch.is_grad_enabled() and not transforms_active()
    path = [x]
    last = len(solver.times) - 2
    for i, (t, next_t) in enumerate(itertools.pairwise(solver.times)):
        arguments = (stages, field, x, t, next_t - t)
        x = checkpoint(_step, *arguments, use_reentrant=False) if forget else _step(*arguments)
        if solver.clip == "step" or (solver.clip == "end" and i == last):
            x = clipped(x, solver)
        if return_path:
            path.append(x)
    if not return_path:
        return x
    with autocast(x.device, None):  # in bfloat16, it cannot stack float16
        return torch.stack(path)


def clipped(x: Tensor, solver: Solver) -> Tensor:
    """x within the bounds; those beyond its dtype do not bind."""
    largest = torch.finfo(x.dtype).max
    low, high = (b if abs(b) <= largest else math.copysign(math.inf, b) for b in (solver.low, solver.high))
    return x.clamp(low, high)


def _step(stages: tuple[Stage, ...], v: Field, x: Tensor, t: float, h: float) -> Tensor:
    z = end = x
    for at, reach, weight in stages:
        k = v(z, t + at * h)
        if reach:
            z = torch.add(x, k, alpha=reach * h)
        if weight:
            end = torch.add(end, k, alpha=weight * h)
    return end
