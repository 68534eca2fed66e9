"""The dtype in which an operator computes."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The promoted dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def nearest_float32(number: float) -> float:
    """A number of moderate size, rounded to float32 by arithmetic (Veltkamp's), which a compiler can trace."""
    scaled = number * (2.0**29 + 1)
    return scaled - (scaled - number)
