"""The Fisher trust region: how far a displacement moves, measured by the behaviour density's own scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.operators import penalty_formula, penalty_operator, plain_is_better
from fdkernels.validation import check_at_least, check_choice, check_floating

Normalize = Literal["trace", "none"]
Reduction = Literal["none", "mean", "sum"]


def fisher_penalty(
    displacement: Tensor,
    score: Tensor,
    *,
    damping: float = 1e-3,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    backend: Backend | None = None,
) -> Tensor:
    r"""Fisher-weighted size δᵀF̂δ / d of a displacement, without forming the d×d matrix.

    With F = (1/K) Σ_k s_k s_kᵀ + λI and F̂ = F / max(tr F / d, ε), computed in O(K·d) as

        [ (1/K) Σ_k (s_k·δ)² + λ‖δ‖² ] / max( (1/K) Σ_k ‖s_k‖² + λd, εd ).

    ½δᵀFδ is the second-order expansion of KL(p(·−δ) ‖ p). An isotropic F gives mean(δ²).

    Args:
        displacement: δ, shape (..., d); float32, bfloat16, float16 or float64.
        score: s, scores ∇ₓ log p at K samples, shape (..., K, d), same leading shape and device.
        damping: λ ≥ 0.
        normalize: ``"trace"`` for F̂; ``"none"`` for δᵀFδ / d.
        eps: ε > 0, lower bound of tr F / d.
        reduction: ``"none"`` keeps the leading shape; ``"mean"`` and ``"sum"`` give a scalar.
        backend: ``None`` takes Triton for CUDA tensors in float32, bfloat16 or float16, PyTorch otherwise; ``"torch"``
            or ``"triton"`` insist. The kernels read contiguous tensors; others are copied first.

    Returns:
        Penalty (...), or a scalar; float64 for float64 inputs, float32 otherwise. Differentiable in ``displacement``
        and in ``score`` (the true derivative, normaliser included, and none through the normaliser where ε bounds
        it), to any order. An agent that treats the trust region as given passes ``score.detach()``. NaN and infinite
        values propagate to their own row only. Zero scores with ``damping=0`` give zero.

    Raises:
        TypeError: a tensor is missing or not floating point.
        ValueError: shapes do not fit, d or K is zero, devices differ, or an option is out of its range.
        RuntimeError: the backend asked for cannot serve these tensors.

    Source: "Fisher Decorator" (arXiv 2604.17919); the trace normalisation follows its published implementation.

    Example:
        >>> import torch, fdkernels
        >>> score = torch.tensor([[[3.0, 0.0], [-3.0, 0.0]]])  # the data vary little along the first axis
        >>> step = torch.tensor([[0.1, 0.0]]), torch.tensor([[0.0, 0.1]])
        >>> [round(fdkernels.fisher_penalty(s, score).item(), 7) for s in step]
        [0.0099989, 1.1e-06]
    """
    op = "fisher_penalty"
    check_floating(op, displacement=displacement, score=score)
    check_displacement(op, displacement, "score", score)
    check_penalty_settings(op, damping, normalize, eps, reduction)
    triton = choose_backend(op, backend, displacement, score) == "triton"
    return reduce(penalty_from_score(displacement, score, damping, normalize, eps, triton), reduction)


def penalty_from_score(
    displacement: Tensor, score: Tensor, damping: float, normalize: Normalize, eps: float, triton: bool
) -> Tensor:
    """The penalty, on checked arguments."""
    settings = (float(damping), normalize == "trace", float(eps))
    if not triton and plain_is_better(displacement, score):
        return penalty_formula(displacement, score, *settings)[0]
    return penalty_operator(displacement, score, *settings, False, False, triton)[0]


def check_displacement(op: str, displacement: Tensor, name: str, samples: Tensor) -> None:
    """displacement is (..., d) and ``samples`` (..., K, d), d and K at least 1."""
    if displacement.ndim == 0 or displacement.shape[-1] == 0:
        raise ValueError(f"{op}: displacement must be (..., d) with d of at least 1, got {tuple(displacement.shape)}")
    d = displacement.shape[-1]
    lead_fits = samples.ndim >= 2 and samples.shape[:-2] == displacement.shape[:-1] and samples.shape[-1] == d
    if not lead_fits or samples.shape[-2] == 0:
        raise ValueError(
            f"{op}: {name} must be (..., K, d) with K of at least 1, the displacement's d={d} and its leading shape "
            f"{tuple(displacement.shape[:-1])}, got {tuple(samples.shape)}"
        )


def check_penalty_settings(op: str, damping: float, normalize: Normalize, eps: float, reduction: Reduction) -> None:
    check_at_least(op, "damping", damping, 0.0)
    check_at_least(op, "eps", eps, 0.0, exclusive=True)
    check_choice(op, "normalize", normalize, ("trace", "none"))
    check_choice(op, "reduction", reduction, ("none", "mean", "sum"))


def reduce(penalty: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return penalty
    return penalty.mean() if reduction == "mean" else penalty.sum()


def fisher_spectrum(score: Tensor, *, damping: float = 1e-3) -> Tensor:
    """Eigenvalues of F = (1/K) Σ_k s_k s_kᵀ + λI, largest first: how anisotropic the behaviour density is.

    A diagnostic, not for hot paths. ``spectrum[..., 0] / spectrum.sum(-1)`` is the share of the stiffest direction
    (1/d when isotropic); few samples exaggerate it, K = 1 gives almost 1 whatever the density.

    Args:
        score: scores at K samples, (..., K, d); float32, bfloat16, float16 or float64.
        damping: λ ≥ 0.

    Returns:
        Eigenvalues (..., d), descending; float64 for a float64 input, float32 otherwise. Differentiable where they
        are distinct.

    Raises:
        TypeError: ``score`` is not a floating-point tensor.
        ValueError: d or K is zero, or ``damping`` is negative.

    Example:
        >>> import torch, fdkernels
        >>> fdkernels.fisher_spectrum(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), damping=0.0)
        tensor([4.5000, 0.5000])
    """
    op = "fisher_spectrum"
    check_floating(op, score=score)
    if score.ndim < 2 or 0 in score.shape[-2:]:
        raise ValueError(f"{op}: score must be (..., K, d) with K and d of at least 1, got {tuple(score.shape)}")
    check_at_least(op, "damping", damping, 0.0)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    with torch.autocast(score.device.type, enabled=False):  # in half precision small eigenvalues come out negative
        fisher = score.mT @ score / score.shape[-2]
        return torch.linalg.eigvalsh(fisher).flip(-1) + damping
