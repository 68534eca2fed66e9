"""The device of the tests, and memory that shows stray accesses: by bands of NaN, and by checks in the interpreter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU: `make gpu` runs it where there is one")
BACKENDS = ("torch", "triton")
# bf16 arithmetic is unreliable in the interpreter; GPU runs test all three.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
# No inductor under the interpreter: a process that ran its CPU code there once aborted, for unknown reasons.
COMPILERS = ("aot_eager",) if INTERPRETED else ("aot_eager", "inductor")
GUARD = 64  # elements; keeps 16-byte alignment


def guarded(tensor: Tensor) -> Tensor:
    """The same values on the device between bands of NaN, so that reads beyond the tensor show."""
    storage = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    inside = storage[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, guarded."""
    if layout == "contiguous" or tensor.ndim < 2:
        return guarded(tensor)
    if layout == "transposed":
        return guarded(tensor.transpose(0, -1).contiguous()).transpose(0, -1)
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    wide[..., 1:-2] = tensor
    return guarded(wide)[..., 1:-2]


def leaves(arguments: Iterable[Any]) -> Iterator[Any]:
    """A kernel's arguments, taken out of their records."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from leaves(argument)
        else:
            yield argument


@contextlib.contextmanager
def guarded_memory() -> Iterator[None]:
    """Under the interpreter, check that every element that a kernel reads or writes lies in one of its arguments.

    NaN bands only show reads that reach a result. This check also shows reads that are discarded, and writes.
    """
    from triton.runtime import interpreter

    spans: list[tuple[int, int]] = []
    to_host = interpreter.GridExecutor._init_args_hst
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def noted(self: Any, args: Any, kwargs: Any) -> Any:
        host = to_host(self, args, kwargs)
        tensors = [arg for arg in leaves((*host[0], *host[1].values())) if isinstance(arg, Tensor)]
        spans[:] = [(arg.data_ptr(), arg.data_ptr() + arg.numel() * arg.element_size()) for arg in tensors]
        return host

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data.astype(bool)].astype("int64")  # a combined mask holds integers
        inside = sum(((low <= addresses) & (addresses + size <= high) for low, high in spans), start=addresses < 0)
        assert inside.all(), f"{what} outside of the kernel's arguments: {(~inside).sum()} elements"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", noted),
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield
