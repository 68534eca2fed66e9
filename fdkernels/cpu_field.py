"""A packed MLP's velocity on the CPU where nobody differentiates, by what the processor has (``processor.py``).

A flow spends its time in the products of the hidden layers, and in plain PyTorch another fifth in their activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkernels import cpu_layers, processor
from fdkernels.mlp import LayerTensors, MLPTensors, layer_norm
from fdkernels.torch_private import has_onednn, onednn_linear, onednn_packed

_FEW_ROWS = 16  # ten steps of one row: 2.1 ms instead of 2.5 in place; of 16 rows 5.4 instead of 5.1
_FEW_ROWS_FOR_ONEDNN = 48  # ten steps of one row: 1.4 ms in PyTorch, 2.6 in oneDNN, with AVX-512
_MANY_ROWS = 768  # laying out 512² takes 0.12 ms once, and spares 0.09 at every step; of 1,536 rows 0.2, of 256 0.03
_WIDE_CONDITION = 64  # from here on its share of the first layer is computed once, and costs memory at every step
_FUSED: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
}


def serves(x: Tensor) -> bool:
    """Whether nothing looks on that wants plain formulas."""
    return not torch.is_grad_enabled() and cpu_layers.serves(x)


class CpuField:
    """v(x, t) for a fixed condition that broadcasts to ``lead``; x (*lead, d) in float32."""

    def __init__(self, mlp: MLPTensors, cond: Tensor | None, lead: Sequence[int]) -> None:
        num_rows = torch.Size(lead).numel()
        self.mlp, self.work = mlp, Workspace(mlp, num_rows)
        self.middle = [self.work.packed(layer) for layer in mlp.middle]
        columns = dict(mlp.columns)
        self.offset: Tensor | None = None
        if cond is not None and cond.shape[-1] > _WIDE_CONDITION:
            share = mlp.cond_share(cond)
            assert share is not None
            self.offset = share.expand(*lead, -1).reshape(num_rows, share.shape[-1])
            del columns["cond"]
            self.of_x_and_t = torch.cat(list(columns.values()), 1).t()
        widths = [weight.shape[1] for weight in columns.values()]
        self.rows = torch.empty(num_rows, sum(widths), device="cpu")
        self.inputs = dict(zip(columns, self.rows.view(*lead, sum(widths)).split(widths, -1)))
        if cond is not None and self.offset is None:
            self.inputs["cond"].copy_(cond)

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        work, mlp = self.work, self.mlp
        self.inputs["x"].copy_(x)
        self.inputs["t"].copy_(t) if isinstance(t, Tensor) else self.inputs["t"].fill_(t)
        if self.offset is not None:
            h = work.finish(torch.addmm(self.offset, self.rows, self.of_x_and_t), mlp.first)
        elif mlp.last is None:  # the result is not to lie in shared memory
            h = _plain_layer(self.rows, mlp.first)
        else:
            h = work.layer(self.rows, mlp.first)
        for layer in self.middle:
            h = work.layer(mlp.operand(h, layer), layer)
        if mlp.last is not None:
            h = F.linear(h.to(mlp.last.weight.dtype), mlp.last.weight, mlp.last.bias)
        return h.view(x.shape)


class Workspace:
    """What layers need to write into the same memory at every step: in turn into two buffers, what GELU multiplies by
    into a third. Fresh memory costs more than what is done with it here: it is in no cache, or not even mapped."""

    def __init__(self, mlp: MLPTensors, num_rows: int) -> None:
        widest = max(layer.weight.shape[0] for layer in (mlp.first, *mlp.middle))
        self.num_rows = num_rows
        self.out, self.before, self.gate = torch.empty(3, num_rows * widest, device="cpu")
        half = any(layer.weight.dtype != torch.float32 for layer in mlp.middle)
        if half or (num_rows >= _FEW_ROWS_FOR_ONEDNN and processor.has_avx512() and has_onednn()):
            self.layer = _fused_layer
        elif num_rows < _FEW_ROWS:
            self.layer = _plain_layer
        else:
            self.layer = self._layer_in_place

    def packed(self, layer: LayerTensors) -> LayerTensors:
        """With its weight laid out once as oneDNN otherwise does at every step."""
        if self.layer is not _fused_layer or self.num_rows < _MANY_ROWS:
            return layer
        return layer._replace(weight=onednn_packed(layer.weight, self.num_rows))

    def finish(self, h: Tensor, layer: LayerTensors) -> Tensor:
        """What follows a product. tanh-GELU by a sigmoid, which takes half the time of PyTorch's own."""
        if layer.activation != "gelu_tanh" or self.num_rows < _FEW_ROWS:
            return layer.finish(h)
        if layer.norm_before is not None:
            h = layer_norm(h, layer.norm_before)
        h = h.mul_(cpu_layers.gelu_gate(h, out=self._part(self.gate, h.shape[1])))
        return h if layer.norm_after is None else layer_norm(h, layer.norm_after)

    def _layer_in_place(self, h: Tensor, layer: LayerTensors) -> Tensor:
        if cpu_layers.onednn_suits(h, layer.weight):
            return self.finish(cpu_layers.linear(h, layer.weight, layer.bias), layer)
        out = self._part(self.out, layer.weight.shape[0])
        self.out, self.before = self.before, self.out
        if layer.bias is None:
            torch.mm(h, layer.weight.t(), out=out)
        else:
            torch.addmm(layer.bias, h, layer.weight.t(), out=out)
        return self.finish(out, layer)

    def _part(self, buffer: Tensor, width: int) -> Tensor:
        return buffer[: self.num_rows * width].view(self.num_rows, width)


def _plain_layer(h: Tensor, layer: LayerTensors) -> Tensor:
    return layer.finish(F.linear(h, layer.weight, layer.bias))


def _fused_layer(h: Tensor, layer: LayerTensors) -> Tensor:
    """Normalisation is done in float32 whatever the product's dtype."""
    fused = _FUSED[None if layer.norm_before is not None else layer.activation]
    h = onednn_linear(h, layer.weight, layer.bias, *fused)
    if layer.norm_before is not None:
        return layer.finish(h.float())
    return h if layer.norm_after is None else layer_norm(h.float(), layer.norm_after)
