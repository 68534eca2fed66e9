"""Every name of PyTorch that is used here without being public, why, and what takes its place where PyTorch lacks it.

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
