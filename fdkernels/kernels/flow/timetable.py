"""A solver in the form that kernels take: one line for each evaluation of the velocity."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import HALF
from fdkernels.solvers import METHODS, Solver


class Timetable(NamedTuple):
    """A solver's lines, its bounds, and the precision of its network's products."""

    lines: tuple[float, ...]
    """Four numbers for each evaluation: time, reach, weight, and 1 if a step ends."""
    low: float
    high: float
    clip: str
    precision: str

    @property
    def num_evals(self) -> int:
        return len(self.lines) // 4

    @property
    def num_steps(self) -> int:
        return int(sum(self.lines[3::4]))

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The dtype of the hidden layers' operands."""
        return HALF.get(self.precision, torch.float32)

    @property
    def dot_precision(self) -> str:
        """The precision of products of float32 operands, as Triton names it."""
        return "tf32x3" if self.precision == "highest" else "tf32"

    def on(self, device: torch.device) -> Tensor:
        return _on_device(self.lines, device)


def timetable(solver: Solver, precision: str) -> Timetable:
    return Timetable(_lines(tuple(solver.times), solver.method), solver.low, solver.high, solver.clip, precision)


def put_on_device(times: tuple[float, ...], method: str, device: torch.device) -> None:
    """Put a solver's lines on the device for good, while a graph is traced.

    The traced graph's first run would be too late: its memory may belong to a CUDA graph that is about to be recorded.
    """
    _on_device(_lines(times, method), device)


@functools.lru_cache(maxsize=64)
def _lines(times: tuple[float, ...], method: str) -> tuple[float, ...]:
    """The lines of a solver; none if it has no times."""
    lines: list[float] = []
    for t, next_t in itertools.pairwise(times):
        h, stages = next_t - t, METHODS[method]
        for i, stage in enumerate(stages):
            lines += [t + stage.at * h, stage.reach * h, stage.weight * h, float(i == len(stages) - 1)]
    return tuple(lines)


@functools.cache
def _on_device(lines: tuple[float, ...], device: torch.device) -> Tensor:
    """The lines on a device, copied once and kept: a captured graph reads them there again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a solver that was never run cannot be captured in a CUDA graph: call it once before")
    return torch.tensor(lines or (0.0,) * 4, dtype=torch.float32, device=device)
