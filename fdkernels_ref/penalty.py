"""The Fisher matrix of the behaviour density, and the quadratic penalty it puts on a displacement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda penalty: penalty,
    "mean": torch.mean,
    "sum": torch.sum,
}


def fisher_matrix(score: Tensor, *, damping: float = 1e-3) -> Tensor:
    """F = (1/K)·Σ_k s_k·s_kᵀ + λ·I: the paper's Fisher matrix E[s·sᵀ], s = ∇ log p, estimated from K scores.

    This is the Fisher information about location: KL(p(·−δ) ‖ p) = ½·δᵀ·E[s·sᵀ]·δ + O(‖δ‖³). The damping λ comes from
    the published code.

    Args:
        score: s_k, (..., K, d).
        damping: λ.

    Returns:
        (..., d, d), symmetric, in the dtype of score. Differentiable in score.
    """
    # The outer products are written out, since a sum over k inside the einsum would overflow in float16.
    outer = einsum(score, score, "... k i, ... k j -> ... k i j")
    identity = torch.eye(score.shape[-1], dtype=score.dtype, device=score.device)
    return reduce(outer, "... k i j -> ... i j", "mean") + damping * identity


def normalize_fisher(fisher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """F̂ = F / max(tr F/d, ε): the directions of F without its size, so that F ∝ I gives F̂ = I (published code).

    Args:
        fisher: F, (..., d, d).
        eps: ε, a lower bound on the divisor tr F/d, the mean eigenvalue of F.

    Returns:
        (..., d, d). Differentiable in fisher, through the trace as well; where tr F/d < ε the divisor is a constant.
    """
    diagonal = einsum(fisher, "... i i -> ... i")
    mean_eigenvalue = reduce(diagonal, "... i -> ... 1 1", "mean")
    return fisher / mean_eigenvalue.clamp(min=eps)


def fisher_penalty(
    displacement: Tensor,
    score: Tensor,
    *,
    damping: float = 1e-3,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """The paper's trust-region penalty δᵀF̂δ/d. It is mean(δ²) where F ∝ I, and more along directions that p resists.

    Args:
        displacement: δ, (..., d).
        score: s_k, (..., K, d), the K scores that F is estimated from.
        damping: λ of `fisher_matrix`.
        normalize: "trace" for F̂, "none" for F itself.
        eps: ε of `normalize_fisher`.
        reduction: "none", or "mean" or "sum" over all leading dimensions.

    Returns:
        (...), or a scalar after a reduction. Differentiable in displacement and in score, through the normaliser too.
        An agent that holds its behaviour policy fixed detaches the score; the gradient is then 2·F̂δ/d.
    """
    fisher = fisher_matrix(score, damping=damping)
    if normalize == "trace":
        fisher = normalize_fisher(fisher, eps=eps)
    elif normalize != "none":
        raise ValueError(f"fisher_penalty: normalize must be 'trace' or 'none', got {normalize!r}")
    delta = rearrange(displacement, "... i -> ... i 1")
    quadratic = rearrange(delta.mT @ fisher @ delta, "... 1 1 -> ...")
    return reduce_penalty(quadratic / displacement.shape[-1], reduction)


def reduce_penalty(penalty: Tensor, reduction: str) -> Tensor:
    """The penalty as it is for "none", or its "mean" or "sum" over all dimensions."""
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
