"""A hidden layer by the library's matrix product, with what follows it fused into the product where cuBLAS can."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkernels.mlp import activation_function
from fdkernels.torch_private import linear_gelu


class HiddenLayer(NamedTuple):
    """Weight (out, in) or, of many networks, (models, out, in), and all else likewise."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: str
    norm: str
    eps: float

    def multiplying(self, dtype: torch.dtype) -> HiddenLayer:
        """With weight and bias in another dtype, which is that of the activations too."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def __call__(self, h: Tensor) -> Tensor:
        """(models, rows, in) -> (models, rows, out)."""
        if self.weight.ndim == 3:
            product = h @ self.weight.mT
            product = product if self.bias is None else product.add_(self.bias.unsqueeze(1))
        elif h.is_cuda and self.bias is not None and self.norm == "none" and self.activation == "gelu_tanh":
            # cuBLAS applies it as it writes the product. Its ReLU is not used: nothing says that NaN stays NaN there.
            return linear_gelu(h[0], self.weight, self.bias).unsqueeze(0)
        else:
            product = F.linear(h, self.weight, self.bias)
        return self.finish(product).to(h.dtype)

    def finish(self, h: Tensor) -> Tensor:
        """What follows the product."""
        if self.norm == "before":
            h = self._normalised(h)
        if self.activation != "none":
            h = activation_function(self.activation)(h)
        if self.norm == "after":
            h = self._normalised(h)
        return h

    def _normalised(self, h: Tensor) -> Tensor:
        """Layer norm in float32; scale and shift of many networks differ by network."""
        h = F.layer_norm(h.float(), h.shape[-1:], eps=self.eps)
        if self.scale is not None:
            h = h * self.scale.unsqueeze(-2)
        return h if self.shift is None else h + self.shift.unsqueeze(-2)
