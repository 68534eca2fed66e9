"""Affine paths x_t = α_t·a + σ_t·x0 between noise x0 and data a, and their time derivatives α̇_t, σ̇_t."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class AffinePath(Protocol):
    """A path: any object with these four functions of time, each from (...) to (...)."""

    def alpha(self, t: Tensor, /) -> Tensor:
        """α_t, the weight of the data."""

    def sigma(self, t: Tensor, /) -> Tensor:
        """σ_t, the weight of the noise."""

    def d_alpha(self, t: Tensor, /) -> Tensor:
        """α̇_t = dα_t/dt."""

    def d_sigma(self, t: Tensor, /) -> Tensor:
        """σ̇_t = dσ_t/dt."""


class _Path(NamedTuple):
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]


# Variance preserving: α² + σ² = 1, α = exp(−½∫₀^τ β), β(τ) = β0 + τ·(β1 − β0) (Song et al., 2021). There τ runs from
# data to noise; here t runs from noise to data, so τ = 1 − t.
_BETA0, _BETA1 = 0.1, 20.0


def _vp_log_alpha(t: Tensor) -> Tensor:
    tau = 1 - t
    return -0.25 * tau**2 * (_BETA1 - _BETA0) - 0.5 * tau * _BETA0


def _vp_alpha(t: Tensor) -> Tensor:
    return torch.exp(_vp_log_alpha(t))


def _vp_sigma(t: Tensor) -> Tensor:
    return torch.sqrt(-torch.expm1(2 * _vp_log_alpha(t)))  # √(1 − α²) without cancellation near t = 1


def _vp_d_alpha(t: Tensor) -> Tensor:
    return 0.5 * (_BETA0 + (1 - t) * (_BETA1 - _BETA0)) * _vp_alpha(t)


def _vp_d_sigma(t: Tensor) -> Tensor:
    return -_vp_alpha(t) * _vp_d_alpha(t) / _vp_sigma(t)  # from α² + σ² = 1; −∞ at t = 1


PATHS: dict[str, AffinePath] = {
    "linear": _Path(
        alpha=lambda t: t,
        sigma=lambda t: 1 - t,
        d_alpha=lambda t: torch.ones_like(t),
        d_sigma=lambda t: -torch.ones_like(t),
    ),
    # Data at t = 0 and noise at t = 1, the convention of robot policies.
    "linear_reversed": _Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=lambda t: torch.ones_like(t),
    ),
    "cosine": _Path(
        alpha=lambda t: torch.sin(math.pi / 2 * t),
        sigma=lambda t: torch.cos(math.pi / 2 * t),
        d_alpha=lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
        d_sigma=lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    ),
    "vp": _Path(_vp_alpha, _vp_sigma, _vp_d_alpha, _vp_d_sigma),
}


def path_of(path: str | AffinePath) -> AffinePath:
    """The path itself, or the one of that name."""
    return PATHS[path] if isinstance(path, str) else path


def data_time(path: str | AffinePath) -> float:
    """The data's end of a path, 1 or 0: where noise weighs less beside data, σ_0·α_1 > σ_1·α_0 or the reverse."""
    ends, path = torch.tensor([0.0, 1.0], dtype=torch.float64), path_of(path)
    (alpha_0, alpha_1), (sigma_0, sigma_1) = path.alpha(ends), path.sigma(ends)
    return 1.0 if sigma_0 * alpha_1 > sigma_1 * alpha_0 else 0.0
