"""The activations of a velocity MLP, one row each. ``kernels/activate.py`` has one branch for each in the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkernels.cpu.layers import gelu_tanh

ActivationName = Literal["gelu_tanh", "gelu", "silu", "relu", "tanh"]


class GELU(nn.GELU):
    """``nn.GELU`` in its tanh form, computed in the way that suits the processor."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, h: Tensor) -> Tensor:
        return gelu_tanh(h) if self.approximate == "tanh" else super().forward(h)


class Activation(NamedTuple):
    module: Callable[[], nn.Module]
    """Makes the module for a network."""
    recognises: Callable[[nn.Module], bool]
    """Whether a module in a user's network is this activation."""
    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """Its derivative."""
    torch: tuple[str, str]
    """PyTorch's name for the function, and its form if it has several."""
    onednn: tuple[str, str] | None
    """oneDNN's name and form of it; None if oneDNN does not fuse it into a product."""


def _is(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) is kind


def _is_gelu(approximate: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) in (nn.GELU, GELU) and module.approximate == approximate


def _gelu_slope(approximate: str) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.ops.aten.gelu_backward(torch.ones_like(h), h, approximate=approximate)


def _silu_slope(h: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(torch.ones_like(h), h)


def _tanh_slope(h: Tensor) -> Tensor:
    return 1 - torch.tanh(h).square()


def _relu_slope(h: Tensor) -> Tensor:
    return torch.where(h.isnan(), h, (h > 0).to(h.dtype))


ACTIVATIONS: dict[str, Activation] = {
    "gelu_tanh": Activation(GELU, _is_gelu("tanh"), gelu_tanh, _gelu_slope("tanh"), ("gelu", "tanh"), ("gelu", "tanh")),
    "gelu": Activation(nn.GELU, _is_gelu("none"), F.gelu, _gelu_slope("none"), ("gelu", "none"), ("gelu", "none")),
    "silu": Activation(nn.SiLU, _is(nn.SiLU), F.silu, _silu_slope, ("silu", ""), ("swish", "")),
    "relu": Activation(nn.ReLU, _is(nn.ReLU), F.relu, _relu_slope, ("relu", ""), ("relu", "")),
    "tanh": Activation(nn.Tanh, _is(nn.Tanh), torch.tanh, _tanh_slope, ("tanh", ""), ("tanh", "")),
}
"""The activations of velocity networks. Their names are public; what stands behind them may change."""


def name_of(module: nn.Module) -> str | None:
    """The name of the activation that a module is, or None."""
    for name, row in ACTIVATIONS.items():
        if row.recognises(module):
            return name
    return None
