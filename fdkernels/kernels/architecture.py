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


@functools.cache
def _encode(net: Architecture) -> str:
    return repr(tuple(net))


@functools.cache
def device_table(lines: tuple[float, ...], device: torch.device) -> Tensor:
    """A solver's table on the device, copied there once and kept: a captured graph reads it there again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a solver that was never run cannot be captured in a CUDA graph: call it once before")
    return torch.tensor(lines or (0.0,) * 4, dtype=torch.float32, device=device)
