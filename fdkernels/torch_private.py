"""Every name of PyTorch that is used here without being public, why, and what takes its place where PyTorch lacks it.

Operators of ATen that PyTorch's own derivatives are made of (``torch.ops.aten``) do not count.
``make test-versions`` is what says that they are there, from the oldest PyTorch supported to the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable)

transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a ``torch.func`` transform looks on; ``torch.func`` tells of single tensors only, and slowly.

Instead: as if one always did, which costs speed on the CPU, and gradients through the kernels.
"""


def forward_mode_active() -> bool:
    """Whether ``torch.autograd.forward_ad`` looks on. Its public functions ask tensor by tensor.

    Instead: as if it never did, and oneDNN's products would lose tangents.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


clear_cublas_workspaces: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
"""So that a CUDA graph gets a cuBLAS workspace of its own; no public function frees one.

Instead: nothing. PyTorch without CUDA has no such name, and needs none.
"""


def linear_gelu(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of a linear map of rows (n, in), which cuBLAS applies as it writes the product; public functions don't.

    Instead: the product, then the activation.
    """
    if hasattr(torch, "_addmm_activation"):
        return torch._addmm_activation(bias, h, weight.t(), use_gelu=True)
    return F.gelu(F.linear(h, weight, bias), approximate="tanh")


def constant_when_compiled(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import the compiler, and Triton with it.

    Instead: a compiler that does not know the mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def half_units(dtype: torch.dtype) -> bool:
    """Whether oneDNN has units of this processor for products in bfloat16 or float16; only private functions tell.

    Instead: no, which gives the same numbers at the speed of float32.
    """
    if not has_onednn():
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    if not getattr(torch.ops.mkldnn, supported, lambda: False)():
        return False
    # for bfloat16 oneDNN also says yes where it makes do with AVX-512
    real = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return dtype != torch.bfloat16 or torch.backends.cpu.get_cpu_capability() != "AVX512" or bool(real())


def has_onednn() -> bool:
    """Whether :func:`onednn_linear` is there."""
    mkldnn = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: str, form: str) -> Tensor:
    """oneDNN's product with bias and activation fused, as ``torch.compile`` uses it for frozen models.

    Instead: whoever calls it asks :func:`has_onednn` first.
    """
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, activation, [], form)


def onednn_packed(weight: Tensor, num_rows: int) -> Tensor:
    """The weight as :func:`onednn_linear` would lay it out for itself at every call with this many rows.

    Instead: the weight as it is.
    """
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, num_rows: weight)
    return pack(weight, max(num_rows, 1))
