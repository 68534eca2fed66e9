"""A network's layers on the CPU, with their gradients, by what the processor has (``processor.py``).

Each is PyTorch's own function with PyTorch's own result, to rounding, and is that function wherever this has nothing
better: on other devices and dtypes, compiled, under ``torch.func``, forward-mode differentiation or autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkernels import processor
from fdkernels.torch_private import forward_mode_active, onednn_linear, transforms_active

_MANY_ROWS = 48
_WIDE = 128  # 64 rows, inputs and outputs take either library the same time
_MANY_NUMBERS = 8192
_SLOPE = 1.5957691216057308  # √(8/π)
_CUBIC = 0.044715 * _SLOPE
_SLOPES = torch.tensor(_SLOPE, device="cpu")


def serves(*tensors: Tensor) -> bool:
    """Whether these are plain float32 tensors on the CPU, and nothing looks on that wants PyTorch's own functions."""
    if torch.compiler.is_compiling() or transforms_active() or forward_mode_active():
        return False
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )
    return plain and not torch.is_autocast_enabled("cpu")


def multiplies_apart(x: Tensor) -> bool:
    """Whether networks side by side are faster one by one than as one batched product, which is PyTorch's alone."""
    return serves(x) and processor.onednn_multiplies()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., in), weight (out, in), bias (out,). Differentiable, any number of times."""
    if x.numel() < _MANY_ROWS * x.shape[-1]:  # the first question, so that a robot's one row waits for no other
        return F.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    if not (serves(*given) and onednn_suits(x, weight)):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = onednn_linear(rows, weight, bias, "none", "")
    return out.view(*x.shape[:-1], -1)


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these faster than PyTorch, if they are served."""
    # a weight may lie in memory by rows or by columns; other views oneDNN would have to copy
    lies_well = weight.ndim == 2 and (weight.is_contiguous() or weight.t().is_contiguous())
    if not lies_well or min(weight.shape) < _WIDE or x.numel() < _MANY_ROWS * weight.shape[1]:
        return False
    return x.shape[-1] == weight.shape[1] and processor.onednn_multiplies()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias, "none", "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        of_weight = None
        if to_weight and weight.is_contiguous():
            of_weight = linear(gradient.t(), x.t())
        elif to_weight:
            of_weight = linear(x.t(), gradient.t()).t()
        return linear(gradient, weight.t()) if to_x else None, of_weight, gradient.sum(0) if to_bias else None


def gelu_tanh(h: Tensor) -> Tensor:
    """``F.gelu(h, approximate="tanh")`` as h·sigmoid(√(8/π)·(h + 0.044715·h³)). Differentiable, any number of times."""
    if h.numel() < _MANY_NUMBERS or not (serves(h) and processor.sigmoid_is_fast()):
        return F.gelu(h, approximate="tanh")
    if torch.is_grad_enabled() and h.requires_grad:
        return _GELU.apply(h)
    return gelu_gate(h).mul_(h)


def gelu_gate(h: Tensor, out: Tensor | None = None) -> Tensor:
    """What tanh-GELU multiplies h by."""
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
        if torch.is_grad_enabled():  # somebody differentiates this
            return torch.ops.aten.gelu_backward(gradient, h, approximate="tanh")
        # gate·(1 + h·u′·(1 − gate)) with u what the sigmoid was taken of, all in one buffer
        slope = torch.addcmul(_SLOPES, h, h, value=3 * _CUBIC).mul_(h)
        slope.addcmul_(slope, gate, value=-1)
        return torch.addcmul(gate, gate, slope, out=slope).mul_(gradient)
