"""The one place where a backend is chosen, before autograd sees the tensors."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from fdkernels.torch_private import constant_when_compiled
from fdkernels.validation import check_choice

Backend = Literal["triton", "torch"]

_SERVED = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once, too: when it is imported


def choose_backend(op: str, backend: Backend | None, *tensors: Tensor, asked: str = "backend='triton'") -> Backend:
    """``None`` picks Triton for CUDA tensors that it serves; an explicit choice that cannot be honoured raises.

    ``asked`` is what the caller wrote where that insists on Triton.
    """
    check_choice(op, "backend", backend, (None, "triton", "torch"))  # type: ignore[arg-type]
    on_gpu = tensors[0].device.type == "cuda"
    if backend == "torch" or (backend is None and not on_gpu):
        return "torch"
    reason = _why_not_triton(*tensors)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"{op}: {asked} {reason}; leave the choice open, or use backend='torch'")
    return "torch"


def _why_not_triton(*tensors: Tensor) -> str | None:
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed"
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETER):
        return f"needs CUDA tensors, or CPU tensors and TRITON_INTERPRET=1 in the environment, got {device}"
    for tensor in tensors:
        if tensor.dtype not in _SERVED:
            return f"serves float32, bfloat16 and float16, got {tensor.dtype}"
    return None


@constant_when_compiled
def float32_products() -> str:
    """What ``torch.set_float32_matmul_precision`` was told."""
    return torch.get_float32_matmul_precision()
