"""The one place where a backend is chosen, before autograd sees the tensors."""

from __future__ import annotations

from typing import Literal

from fdkernels.validation import check_choice

Backend = Literal["triton", "torch"]


def choose_backend(op: str, backend: Backend | None) -> Backend:
    """``None`` picks what there is; an explicit choice that cannot be honoured raises."""
    check_choice(op, "backend", backend, (None, "triton", "torch"))  # type: ignore[arg-type]
    if backend == "triton":
        raise RuntimeError(f"{op}: backend='triton' is not in this version; use backend=None or backend='torch'")
    return "torch"
