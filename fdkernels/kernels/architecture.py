"""A velocity MLP and a solver as the launchers are told of them."""

from __future__ import annotations

import ast
import functools
from typing import NamedTuple

import torch
from torch import Tensor

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # operands of the products; "high" and "highest": float32


class Architecture(NamedTuple):
    """What of a velocity MLP is not a tensor; ``widths`` and all that follows per hidden layer."""

    cond_dim: int
    action_dim: int
    order: tuple[str, ...]
    widths: tuple[int, ...]
    activations: tuple[str, ...]
    norms: tuple[str, ...]  # "none", "before" or "after" the activation
    norm_eps: tuple[float, ...]

    def encode(self) -> str:
        """As an operator's argument."""
        return repr(tuple(self)) if torch.compiler.is_compiling() else _encode(self)

    @staticmethod
    @functools.cache
    def decode(text: str) -> Architecture:
        return Architecture(*ast.literal_eval(text))

    def column(self, name: str) -> int:
        """Where an input begins in the first layer's weight."""
        widths = {"cond": self.cond_dim, "x": self.action_dim, "t": 1}
        before = self.order[: self.order.index(name)] if name in self.order else ()
        return sum(widths[other] for other in before)


class Solver(NamedTuple):
    """What is done with a network's velocity, and how exactly."""

    table: tuple[float, ...]
    """A line of four for each evaluation: time, reach, weight, and 1 where a step ends."""
    low: float
    high: float
    clip: str
    """ "end", "step" or "never"."""
    precision: str
    """ "highest", "high", "bf16" or "fp16"."""

    @property
    def num_evals(self) -> int:
        return len(self.table) // 4

    @property
    def num_steps(self) -> int:
        return int(sum(self.table[3::4]))

    @property
    def hidden_dtype(self) -> torch.dtype:
        return HALF.get(self.precision, torch.float32)

    @property
    def dot_precision(self) -> str:
        return "tf32x3" if self.precision == "highest" else "tf32"


class Penalty(NamedTuple):
    """What becomes of the velocity at the samples: see ``launch.velocity_penalty``."""

    num_samples: int
    t: float
    p: float
    q: float
    use_x: bool
    damping: float
    normalize: bool
    eps: float
    want_score: bool


@functools.cache
def _encode(net: Architecture) -> str:
    return repr(tuple(net))


@functools.cache
def device_table(lines: tuple[float, ...], device: torch.device) -> Tensor:
    """A solver's table on the device, copied there once and kept: a captured graph reads it there again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a solver that was never run cannot be captured in a CUDA graph: call it once before")
    return torch.tensor(lines or (0.0,) * 4, dtype=torch.float32, device=device)
