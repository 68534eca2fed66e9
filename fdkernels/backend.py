"""Decide once, before autograd sees the tensors, which implementation serves a call.

``cpu/processor.py`` says what is fast on this processor, and ``kernels/tuning`` how the kernels integrate.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fdkernels.torch_private import constant_when_compiled, transforms_active
from fdkernels.validation import check_choice

if TYPE_CHECKING:
    from fdkernels.networks import PackedMLP

Backend = Literal["triton", "torch"]
BACKENDS = (None, "triton", "torch")
Implementation = Literal["stationary", "streamed", "gemm"]
Precision = Literal["highest", "high", "bf16"]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions whose products take half-precision operands, and their dtypes. All others take float32 operands."""
MAX_FLOW_D = 128
"""The most dimensions of a flow that the kernels integrate."""
MAX_PENALTY_D = 8192
"""The most dimensions of a displacement: it and its gradient stay in registers."""

_SERVED = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # triton, too, reads it only when imported


def choose_backend(
    op: str,
    backend: Backend | None,
    *tensors: Tensor,
    asked: str = "backend='triton'",
    max_d: int | None = None,
) -> Backend:
    """``None`` picks Triton for CUDA tensors that it serves; an explicit choice that cannot be honoured raises.

    Args:
        asked: the caller's argument, for the message, if it insists on Triton.
        max_d: the most dimensions that the kernel serves, or None.
    """
    check_choice(op, "backend", backend, BACKENDS)
    on_gpu = tensors[0].device.type == "cuda"
    if backend == "torch" or (backend is None and not on_gpu):
        return "torch"
    reason = _why_not_triton(*tensors)
    if reason is None and max_d is not None and tensors[0].shape[-1] > max_d:
        reason = f"serves up to {max_d} dimensions, got {tensors[0].shape[-1]}"
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


def choose_fused(
    op: str,
    backend: Backend | None,
    implementation: Implementation | None,
    packed: PackedMLP | None,
    tensors: Sequence[Tensor],
    differentiable: bool = False,
) -> bool:
    """Whether the kernels integrate; a choice that cannot be honoured raises.

    If ``backend`` and ``implementation`` are None, the kernels serve a packed MLP on CUDA. The plain path serves
    everything else, such as a velocity that is not an MLP (``packed`` is None).
    """
    check_way(op, backend, implementation)
    if backend == "torch":
        if implementation is not None:
            raise ValueError(
                f"{op}: implementation={implementation!r} belongs to backend='triton', got backend='torch'"
            )
        return False
    reason = _why_not_fused(packed, differentiable)
    insisted = backend == "triton" or implementation is not None
    asked = "backend='triton'" if implementation is None else f"implementation={implementation!r}"
    if packed is None or reason is not None:
        if insisted:
            raise RuntimeError(f"{op}: {asked} {reason}; leave the choice open")
        choose_backend(op, backend, *tensors)
        return False
    tensors = (*tensors, *(layer.linear.weight for layer in packed.layers))
    return choose_backend(op, "triton" if insisted else None, *tensors, asked=asked) == "triton"


def check_way(op: str, backend: Backend | None, implementation: Implementation | None) -> None:
    """Check that there are such a backend and such an implementation."""
    check_choice(op, "implementation", implementation, (None, "stationary", "streamed", "gemm"))
    check_choice(op, "backend", backend, BACKENDS)


def _why_not_fused(packed: PackedMLP | None, differentiable: bool) -> str | None:
    """Why the kernels do not serve the network, devices and dtypes aside; None if they do."""
    if packed is None:
        return "serves a VelocityMLP or a packed MLP, and this velocity is neither, or has hooks"
    if differentiable and torch.is_grad_enabled():
        return "has no gradient through the solver, which differentiable=True asks for"
    if len(packed.layers) < 2:
        return "serves networks with a hidden layer, got a linear velocity"
    if packed.action_dim > MAX_FLOW_D:
        return f"serves up to {MAX_FLOW_D} dimensions, got {packed.action_dim}"
    if any(layer.norm_before and layer.norm_after for layer in packed.layers):
        return "serves one layer norm in a layer, got one before and one after an activation"
    return None


def check_precision(op: str, precision: Precision | None, *dtypes: torch.dtype) -> None:
    """Check that tensors of these dtypes can have this precision."""
    check_choice(op, "precision", precision, (None, "highest", "high", "bf16"))
    if precision in ("high", "bf16") and torch.float64 in dtypes:
        raise ValueError(f"{op}: precision={precision!r} is less than float64 tensors have; use None or 'highest'")


def settle_precision(precision: Precision | None, weights: torch.dtype, device: str) -> str:
    """ "highest", "high", "bf16" or "fp16". ``None`` follows autocast, the weights' dtype and PyTorch's setting."""
    if precision is not None:
        return precision
    autocast = autocast_enabled(device) and weights != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weights
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float16:
        return "fp16"
    return "highest" if float32_products() == "highest" else "high"


def check_float32_products(op: str, precision: str | None, device: torch.device) -> None:
    """Check that PyTorch's global setting gives this precision. It belongs to the caller and is not changed here."""
    if precision not in ("highest", "high"):
        return
    setting = float32_products()
    if setting == "medium" or (device.type == "cuda" and setting != precision):
        raise RuntimeError(
            f"{op}: precision={precision!r} on the PyTorch path needs torch.set_float32_matmul_precision({precision!r})"
            f", got {setting!r}"
        )


@constant_when_compiled
def float32_products() -> str:
    """The setting of ``torch.set_float32_matmul_precision``, or what ``torch.backends…fp32_precision`` comes to."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        set_for = {backend.fp32_precision for backend in backends}
        return "medium" if "bf16" in set_for else "high" if "tf32" in set_for else "highest"


def plain_is_better(*tensors: Tensor | None) -> bool:
    """On the PyTorch path, whether a plain formula serves better than an operator around it.

    It does under a compiler or a ``torch.func`` transform, which can do more with a formula, and if no gradient is
    wanted, because the operator is there to save autograd's work.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return True
    return not (torch.is_grad_enabled() and any_requires_grad(*tensors))


def autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast to this dtype, or none at all, where the device has it."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def any_requires_grad(*args: Any) -> bool:
    """Whether a tensor requires a gradient, in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, list) and any_requires_grad(*arg):
            return True
    return False
