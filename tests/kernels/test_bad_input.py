"""Each mistake raises a sentence with the operator, the argument, the value it got and the one it wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels
from tests.kernels.device import BACKENDS, DEVICE

δ, s = torch.ones(5, 6, device=DEVICE), torch.ones(5, 4, 6, device=DEVICE)
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize(
    ("displacement", "score", "settings", "error", "message"),
    [
        (δ, s[..., :5], {}, ValueError, r"score must be \(..., K, d\) .* d=6 .* got \(5, 4, 5\)"),
        (δ, s[:3], {}, ValueError, r"leading shape \(5,\), got \(3, 4, 6\)"),
        (δ, s[:, :0], {}, ValueError, "K of at least 1"),
        (δ[:, :0], s[..., :0], {}, ValueError, "d of at least 1"),
        (δ, s.to("meta"), {}, ValueError, "one device"),
        (δ.int(), s, {}, TypeError, "displacement must be float32, bfloat16, float16 or float64, got torch.int32"),
        (δ.tolist(), s, {}, TypeError, "displacement must be a torch.Tensor, got list"),
        (δ, s, {"damping": -1.0}, ValueError, "damping must be finite and >= 0, got -1.0"),
        (δ, s, {"damping": float("nan")}, ValueError, "damping must be finite"),
        (δ, s, {"eps": 0.0}, ValueError, "eps must be finite and > 0"),
        (δ, s, {"normalize": "l2"}, ValueError, "normalize must be one of 'trace', 'none', got 'l2'"),
        (δ, s, {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_penalty(
    backend: str, displacement: Any, score: Tensor, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="fisher_penalty: .*" + message):
        fdkernels.fisher_penalty(displacement, score, **settings, backend=backend)


@backends
@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((s, s[:, :3], 0.5), {}, ValueError, r"x must be velocity's shape .* got \(5, 3, 6\)"),
        ((s, s, 1.0), {}, ValueError, "t must leave some noise"),
        ((s, s, 0.0), {"path": "linear_reversed"}, ValueError, "t must leave some noise"),
        ((s, s, 1.5), {}, ValueError, r"t must lie in \[0, 1\], got 1.5"),
        ((s, s, "0.5"), {}, TypeError, "t must be a number or a torch.Tensor, got str"),
        ((s, s, torch.ones(5, device=DEVICE)), {}, ValueError, r"t must broadcast to \(..., 1\) = \(5, 4, 1\)"),
        ((s, s, 0.5), {"path": "sqrt"}, ValueError, "path must be an AffinePath or one of"),
        ((s, s, 0.5), {"path": "vp", "convention": "velocity"}, ValueError, "defined for path='linear' only"),
        ((s, s, 0.5), {"min_sigma": -1.0}, ValueError, "min_sigma must be finite and >= 0"),
    ],
)
def test_score(
    backend: str, arguments: tuple[Any, ...], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="velocity_to_score: .*" + message):
        fdkernels.velocity_to_score(*arguments, **settings, backend=backend)
    with pytest.raises(error, match="velocity_fisher_penalty: .*" + message):
        fdkernels.velocity_fisher_penalty(δ, *arguments, **settings, backend=backend)


def test_triton_says_what_it_cannot_serve() -> None:
    with pytest.raises(RuntimeError, match=r"serves float32, bfloat16 and float16, got torch\.float64"):
        fdkernels.fisher_penalty(δ, s.double(), backend="triton")
    with pytest.raises(RuntimeError, match="serves up to 8192 dimensions, got 9000; leave the choice open"):
        fdkernels.fisher_penalty(
            torch.ones(1, 9000, device=DEVICE), torch.ones(1, 1, 9000, device=DEVICE), backend="triton"
        )
    with pytest.raises(ValueError, match="backend must be one of"):
        fdkernels.fisher_penalty(δ, s, backend="cuda")  # type: ignore[arg-type]


def test_no_backend_is_chosen_in_silence() -> None:
    """Without an explicit backend, float64 goes to PyTorch on any device."""
    assert fdkernels.fisher_penalty(δ, s.double()).dtype == torch.float64
