"""A network's layers and their gradients on the CPU, in the way that suits the processor (``processor.py``).

Each gives the result of PyTorch's own function up to rounding, and calls that function where there is nothing better:
on other devices and dtypes, when compiled, exported or traced, and under ``torch.func``, forward-mode differentiation
or autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fdkernels.cpu import processor
from fdkernels.torch_private import forward_mode_active, onednn_linear, transforms_active

_MANY_ROWS = 48
_WIDE = 128  # with 64 rows, inputs and outputs, both libraries take the same time
_MANY_NUMBERS = 8192
_SLOPE = 1.5957691216057308  # √(8/π)
_CUBIC = 0.044715 * _SLOPE
_SLOPES = torch.tensor(_SLOPE, dtype=torch.float32, device="cpu")


def serves(x: Tensor) -> bool:
    """Whether x is a plain float32 CPU tensor, and no tracer, transform or autocast needs PyTorch's own functions."""
    if is_compiling() or torch.jit.is_tracing() or transforms_active() or forward_mode_active():
        return False
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu")


def multiplies_apart(x: Tensor) -> bool:
    """Whether several networks run faster one by one than as one batched product."""
    return serves(x) and x.numel() >= _MANY_ROWS * x.shape[-1] and processor.is_amd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., in), weight (out, in), bias (out,). Differentiable, any number of times."""
    # The size is checked first, so that the single row of a robot waits for no other check. It is not checked when
    # compiling, because a compiler would compile small and large separately.
    if is_compiling() or x.numel() < _MANY_ROWS * _WIDE or not (serves(x) and _onednn_suits(weight, bias)):
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[1] or x.numel() < _MANY_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = onednn_linear(rows, weight, bias, "none", "")
    return out.view(*x.shape[:-1], -1)


def _onednn_suits(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can multiply many rows by this weight, and is faster than PyTorch."""
    if not (processor.onednn_multiplies() and serves(weight) and (bias is None or serves(bias))):
        return False
    # A weight may be stored by rows or by columns. oneDNN would copy other views, and ignores the strides of a bias.
    if weight.ndim != 2 or not (weight.is_contiguous() or weight.t().is_contiguous()) or min(weight.shape) < _WIDE:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.by_rows = weight.is_contiguous()
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return onednn_linear(x, weight, bias, "none", "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        of_weight = None
        if to_weight and ctx.by_rows:
            of_weight = linear(gradient.t(), x.t())
        elif to_weight:
            of_weight = linear(x.t(), gradient.t()).t()
        return linear(gradient, weight.t()) if to_x else None, of_weight, gradient.sum(0) if to_bias else None


def gelu_tanh(h: Tensor) -> Tensor:
    """``F.gelu(h, approximate="tanh")`` as h·sigmoid(√(8/π)·(h + 0.044715·h³)). Differentiable, any number of times."""
    if is_compiling() or h.numel() < _MANY_NUMBERS or not (processor.sigmoid_is_fast() and serves(h)):
        return F.gelu(h, approximate="tanh")
    if torch.is_grad_enabled() and h.requires_grad:
        return _GELU.apply(h)
    return gelu_gate(h).mul_(h)


def gelu_gate(h: Tensor, out: Tensor | None = None) -> Tensor:
    """The factor by which tanh-GELU multiplies h."""
    return torch.addcmul(_SLOPES, h, h, value=_CUBIC, out=out).mul_(h).sigmoid_()


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        gate = gelu_gate(h)
        ctx.save_for_backward(h, gate)
        return h * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # the backward pass is differentiated too
            return torch.ops.aten.gelu_backward(gradient, h, approximate="tanh")
        # gate·(1 + h·u′·(1 − gate)) with gate = sigmoid(u), all in one buffer
        slope = torch.addcmul(_SLOPES, h, h, value=3 * _CUBIC).mul_(h)
        slope.addcmul_(slope, gate, value=-1)
        return torch.addcmul(gate, gate, slope, out=slope) * gradient  # not in place: it may be a batch of gradients
