"""The Fisher matrix of the behaviour density, and the quadratic penalty it puts on a displacement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda penalty: penalty,
    "mean": torch.mean,
    "sum": torch.sum,
}


def fisher_matrix(score: Tensor, *, damping: float = 1e-3) -> Tensor:
    """F = (1/K)·Σ_k s_k·s_kᵀ + λ·I: the paper's Fisher matrix E[s·sᵀ], s = ∇ log p, estimated from K scores.

    It is the information of location: KL(p(·−δ) ‖ p) = ½·δᵀ·E[s·sᵀ]·δ + O(‖δ‖³). The damping λ is the published code's.

    Args:
        score: s_k, (..., K, d).
        damping: λ.

    Returns:
        (..., d, d), symmetric, in the dtype of score. Differentiable in score.
    """
    outer = score.unsqueeze(-1) * score.unsqueeze(-2)
    return outer.mean(-3) + damping * torch.eye(score.shape[-1], dtype=score.dtype, device=score.device)


def normalize_fisher(fisher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """F̂ = F / max(tr F/d, ε): the directions of F without its size, so that F ∝ I gives F̂ = I (published code).

    Args:
        fisher: F, (..., d, d).
        eps: ε, the least mean eigenvalue that is divided by.

    Returns:
        (..., d, d). Differentiable in fisher, through the trace too; where ε takes over, the divisor is a constant.
    """
    trace_per_dim = fisher.diagonal(dim1=-2, dim2=-1).mean(-1)
    return fisher / trace_per_dim.clamp(min=eps)[..., None, None]


def fisher_penalty(
    displacement: Tensor,
    score: Tensor,
    *,
    damping: float = 1e-3,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """The paper's trust-region penalty δᵀF̂δ/d: mean(δ²) where F ∝ I, more along directions that p resists.

    Args:
        displacement: δ, (..., d).
        score: s_k, (..., K, d), the K scores behind F.
        damping: λ of `fisher_matrix`.
        normalize: "trace" for F̂, "none" for F itself.
        eps: ε of `normalize_fisher`.
        reduction: "none", or "mean" or "sum" over all leading dimensions.

    Returns:
        (...), a scalar after a reduction. Differentiable in displacement and in score, the normaliser included; an
        agent that holds its behaviour fixed detaches the score, and the gradient is then 2·F̂δ/d.
    """
    fisher = fisher_matrix(score, damping=damping)
    if normalize == "trace":
        fisher = normalize_fisher(fisher, eps=eps)
    elif normalize != "none":
        raise ValueError(f"fisher_penalty: normalize must be 'trace' or 'none', got {normalize!r}")
    delta = displacement.unsqueeze(-1)
    penalty = (delta.mT @ fisher @ delta).squeeze(-1).squeeze(-1) / displacement.shape[-1]
    return _REDUCTIONS[reduction](penalty)


def fisher_spectrum(score: Tensor, *, damping: float = 1e-3) -> Tensor:
    """Eigenvalues of F, largest first: how unequally the behaviour density resists its d directions.

    Args:
        score: s_k, (..., K, d).
        damping: λ of `fisher_matrix`.

    Returns:
        (..., d). Differentiable in score where the eigenvalues are distinct.
    """
    return torch.linalg.eigvalsh(fisher_matrix(score, damping=damping)).flip(-1)
