"""A packed MLP's velocity on the CPU without gradients, in the way that suits the processor (``processor.py``).

A flow spends its time in the products of the hidden layers, and in plain PyTorch another fifth in their activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkernels.activations import ACTIVATIONS
from fdkernels.cpu import layers as cpu_layers
from fdkernels.cpu import processor
from fdkernels.layers import Layer, Network, layer_norm
from fdkernels.torch_private import has_onednn, onednn_linear, onednn_packed

_FEW_ROWS = 16  # ten steps: 2.1 ms with plain layers and 2.5 in place for one row, 5.4 and 5.1 for 16 rows
_FEW_ROWS_FOR_ONEDNN = 48  # ten steps of one row with AVX-512: 1.4 ms in PyTorch, 2.6 in oneDNN
_MANY_ROWS_FOR_MKL = 1280  # EPYC 7003, ten steps: 1,024 rows take both 171 ms; 1,536 take MKL 296, oneDNN 262
_WORTH_PACKING = 768  # packing 512² takes 0.12 ms once; a step saves 0.09, with 1,536 rows 0.2, with 256 0.03
_WIDE_CONDITION = 64  # if wider, its share of the first layer is computed once, and takes memory traffic at every step
Function = Callable[[Tensor], Tensor]


def serves(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor, and neither gradients nor a transform need plain formulas."""
    return not torch.is_grad_enabled() and cpu_layers.serves(x)


class CpuField:
    """v(x, t) for a fixed condition that broadcasts to ``lead``; x (*lead, d) in float32."""

    def __init__(self, mlp: Network, cond: Tensor | None, lead: Sequence[int]) -> None:
        num_rows = torch.Size(lead).numel()
        work = Workspace(mlp, num_rows)
        # Lookups and decisions are made here, because at each step they took a tenth of the time for few rows. The
        # result of a step must not lie in a shared buffer.
        columns = dict(mlp.columns)
        if cond is not None and cond.shape[-1] > _WIDE_CONDITION:
            share = mlp.cond_share(cond)
            assert share is not None
            offset = share.expand(*lead, -1).reshape(num_rows, share.shape[-1])
            del columns["cond"]
            of_x_and_t = torch.cat(list(columns.values()), 1).t()
            first: Function = lambda rows: work.finish(torch.addmm(offset, rows, of_x_and_t), mlp.first)  # noqa: E731
        else:
            first = plain_layer(mlp.first) if mlp.last is None else work.layer(mlp.first)
        self.layers = [first, *(work.layer(layer, mlp.operands) for layer in mlp.middle)]
        self.last = mlp.last
        widths = [weight.shape[1] for weight in columns.values()]
        self.rows = torch.empty(num_rows, sum(widths), dtype=torch.float32, device="cpu")
        inputs = dict(zip(columns, self.rows.view(*lead, sum(widths)).split(widths, -1)))
        self.x, self.t = inputs["x"], inputs["t"]
        if cond is not None and "cond" in inputs:
            inputs["cond"].copy_(cond)

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t) if isinstance(t, Tensor) else self.t.fill_(t)
        h = self.rows
        for layer in self.layers:
            h = layer(h)
        if self.last is not None:
            h = F.linear(h.float(), self.last.weight, self.last.bias)
        return h.view(x.shape)


class Workspace:
    """Buffers that layers write to at every step: two in turn for their outputs, a third for GELU's factor.

    Fresh memory would cost more than the work done in it, because it is in no cache, or not even mapped.
    """

    def __init__(self, mlp: Network, num_rows: int) -> None:
        widest = max(layer.weight.shape[0] for layer in (mlp.first, *mlp.middle))
        self.num_rows = num_rows
        self.out, self.before, self.gate = torch.empty(3, num_rows * widest, dtype=torch.float32, device="cpu")
        half = any(layer.weight.dtype != torch.float32 for layer in mlp.middle)
        self.fuses = half or processor.has_avx512()
        enough = _FEW_ROWS_FOR_ONEDNN if self.fuses else _MANY_ROWS_FOR_MKL if processor.is_amd() else math.inf
        self.onednn = half or (num_rows >= enough and has_onednn())

    def layer(self, layer: Layer, operands: torch.dtype = torch.float32) -> Function:
        """The layer as a function of rows, which are rounded to ``operands``."""
        if self.onednn:
            run = self._onednn_layer(layer)
        elif self.num_rows < _FEW_ROWS:
            run = plain_layer(layer)
        else:
            run = self._layer_in_place(layer)
        if operands == torch.float32:
            return run
        return lambda h: run(h.to(operands).to(layer.weight.dtype))

    def finish(self, h: Tensor, layer: Layer) -> Tensor:
        """Apply what follows a product. tanh-GELU uses a sigmoid, in half the time of PyTorch's own."""
        if layer.activation != "gelu_tanh" or self.num_rows < _FEW_ROWS:
            return layer.finish(h)
        if layer.norm_before is not None:
            h = layer_norm(h, layer.norm_before)
        h = h.mul_(cpu_layers.gelu_gate(h, out=self._part(self.gate, h.shape[1])))
        return h if layer.norm_after is None else layer_norm(h, layer.norm_after)

    def _layer_in_place(self, layer: Layer) -> Function:
        weight, bias = layer.weight.t(), layer.bias

        def run(h: Tensor) -> Tensor:
            out = self._part(self.out, weight.shape[1])
            self.out, self.before = self.before, self.out
            torch.mm(h, weight, out=out) if bias is None else torch.addmm(bias, h, weight, out=out)
            return self.finish(out, layer)

        return run

    def _part(self, buffer: Tensor, width: int) -> Tensor:
        return buffer[: self.num_rows * width].view(self.num_rows, width)

    def _onednn_layer(self, layer: Layer) -> Function:
        weight = onednn_packed(layer.weight, self.num_rows) if self.num_rows >= _WORTH_PACKING else layer.weight
        bias = None if layer.bias is None else layer.bias.contiguous()  # oneDNN ignores its strides
        if not self.fuses:
            return lambda h: self.finish(onednn_linear(h, weight, bias, "none", ""), layer)
        fused, rest = ("none", ""), layer
        onednn = None if layer.activation is None else ACTIVATIONS[layer.activation].onednn
        if layer.norm_before is None and onednn is not None:
            fused, rest = onednn, layer._replace(activation=None)
        return lambda h: rest.finish(onednn_linear(h, weight, bias, *fused), norm_dtype=torch.float32)


def plain_layer(layer: Layer) -> Function:
    weight, bias = layer.weight, layer.bias
    finish: Function = layer.finish
    if layer.norm_before is None and layer.norm_after is None and layer.activation is not None:
        finish = ACTIVATIONS[layer.activation].function
    return lambda h: finish(F.linear(h, weight, bias))
