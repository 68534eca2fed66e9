"""Every private name of PyTorch that the library uses, why, and what replaces it where PyTorch lacks it.

The ATen operators of PyTorch's own derivatives (``torch.ops.aten``) do not count. ``make test-versions`` checks that
the names exist, from the oldest supported PyTorch to the newest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable)

transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a ``torch.func`` transform is active. ``torch.func`` itself reports on single tensors only, and slowly.

Instead: always True, which costs speed on the CPU, and gradients through the kernels.
"""


def applied_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the tensors of a finished ``torch.func`` transform, which an operator never receives:
    the dispatcher unwraps them first. That spares 3.5 µs of 7.7.

    Instead: ``function.apply``.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def forward_mode_active() -> bool:
    """Whether ``torch.autograd.forward_ad`` is active. Its public functions report on single tensors only.

    Instead: always False, so that oneDNN's products would lose tangents.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def autocast_depth() -> int:
    """How many autocasts this thread is in, one inside the other. No public function tells.

    Instead: always 0, so that an autocast inside a forward is only noticed if it switches something on or off.
    """
    depth = getattr(torch, "autocast_increment_nesting", lambda: 1)() - 1
    getattr(torch, "autocast_decrement_nesting", lambda: None)()
    return depth


def runs_forwards_alone(module: nn.Module) -> bool:
    """Whether calling the module runs the forwards of its class and of its parts' classes, and nothing else: no hook of
    theirs, no forward set on one of them. Public functions only add and remove hooks. Operators ask at every call.

    Instead: nothing. Every supported PyTorch has these names.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__:
        return False
    return all([child is None or runs_forwards_alone(child) for child in module._modules.values()])


_clear_cublas_workspaces: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)


@contextlib.contextmanager
def own_cublas_workspace() -> Iterator[None]:
    """Around the recording of a CUDA graph: the graph gets a cuBLAS workspace that nothing else uses or frees.

    No public function does so. Instead: nothing. PyTorch without CUDA lacks the name and does not need it.
    """
    _clear_cublas_workspaces()
    try:
        yield
    finally:
        _clear_cublas_workspaces()


def linear_gelu(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of a linear map of rows (n, in). cuBLAS applies it while writing the product; no public function does.

    Instead: the product, then the activation.
    """
    if hasattr(torch, "_addmm_activation"):
        return torch._addmm_activation(bias, h, weight.t(), use_gelu=True)
    return F.gelu(F.linear(h, weight, bias), approximate="tanh")


def constant_when_compiled(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which itself would import the compiler, and with it Triton.

    Instead: a compiler that does not know the mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def half_units(dtype: torch.dtype) -> bool:
    """Whether oneDNN uses hardware units for products in bfloat16 or float16. Only private functions report it.

    Instead: False, which gives the same numbers at the speed of float32.
    """
    if not has_onednn():
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    if not getattr(torch.ops.mkldnn, supported, lambda: False)():
        return False
    # for bfloat16, oneDNN also says yes if it makes do with AVX-512
    real = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return dtype != torch.bfloat16 or torch.backends.cpu.get_cpu_capability() != "AVX512" or bool(real())


def has_onednn() -> bool:
    """Whether :func:`onednn_linear` is available."""
    mkldnn = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: str, form: str) -> Tensor:
    """oneDNN's product with bias and activation fused, as ``torch.compile`` uses it for frozen models.

    Instead: nothing. Callers check :func:`has_onednn` first.
    """
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, activation, [], form)


def onednn_packed(weight: Tensor, num_rows: int) -> Tensor:
    """The weight in the layout into which :func:`onednn_linear` would convert it at every call with this many rows.

    Instead: the weight as it is.
    """
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, num_rows: weight)
    return pack(weight, max(num_rows, 1))
