"""The Fisher trust region: the size of a displacement, measured by the scores of the behaviour density."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels.backend import MAX_PENALTY_D, Backend, autocast, choose_backend
from fdkernels.events import check_event_dim, check_samples, flat, form, sizes
from fdkernels.ops.penalty import penalty_from_score
from fdkernels.ops.velocity_penalty import penalty_from_velocity
from fdkernels.paths import AffinePath, PathName
from fdkernels.records import (
    REDUCTIONS,
    Convention,
    Normalize,
    Reduction,
    check_penalty_rule,
    check_score_rule,
    check_time,
    reduce,
)
from fdkernels.validation import check_at_least, check_choice, check_floating, check_shape


def fisher_penalty(
    displacement: Tensor,
    score: Tensor,
    *,
    damping: float = 1e-3,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    event_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    r"""Fisher-weighted size δᵀF̂δ / d of a displacement, without forming the d×d matrix.

    With F = (1/K) Σ_k s_k s_kᵀ + λI and F̂ = F / max(tr F / d, ε), the penalty is, in O(K·d),

        [ (1/K) Σ_k (s_k·δ)² + λ‖δ‖² ] / max( (1/K) Σ_k ‖s_k‖² + λd, εd ).

    ½δᵀFδ is the second-order expansion of KL(p(·−δ) ‖ p). An isotropic F gives mean(δ²).

    Args:
        displacement: δ, shape (..., d); float32, bfloat16, float16 or float64.
        score: s, scores ∇ₓ log p at K samples, shape (..., K, d), same leading shape and device.
        damping: λ ≥ 0.
        normalize: ``"trace"`` for F̂; ``"none"`` for δᵀFδ / d.
        eps: ε > 0, lower bound of tr F / d.
        reduction: ``"none"`` keeps the leading shape; ``"mean"`` and ``"sum"`` give a scalar.
        event_dim: how many of the last dimensions make one action. For chunks (horizon, width) it is 2: δ is then
            (..., horizon, width), the scores are (..., K, horizon, width), and d is horizon·width, as if all had been
            flattened.
        backend: ``None`` picks Triton for CUDA tensors in float32, bfloat16 or float16 with d up to 8192, otherwise
            PyTorch; ``"torch"`` and ``"triton"`` insist on one. The kernels read contiguous tensors; others are copied
            first.

    Returns:
        Penalty (...), or a scalar; float64 for float64 inputs, float32 otherwise. Differentiable in ``displacement``
        and in ``score``, to any order: the true derivative, through the normaliser too except where ε bounds it.
        An agent that treats the trust region as fixed passes ``score.detach()``. NaN and infinite values propagate to
        their own row only. Zero scores with ``damping=0`` give zero.

    Raises:
        TypeError: an argument has the wrong type, such as a tensor that is not floating point or not dense.
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
    event_dim = check_event_dim(op, event_dim)
    check_samples(op, displacement, "score", score, event_dim)
    displacement, score = flat(displacement, event_dim), flat(score, event_dim)
    rule = check_penalty_rule(op, damping, normalize, eps)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    triton = choose_backend(op, backend, displacement, score, max_d=MAX_PENALTY_D) == "triton"
    return reduce(penalty_from_score(displacement, score, rule, triton), reduction)


def velocity_fisher_penalty(
    displacement: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    *,
    path: PathName | AffinePath = "linear",
    convention: Convention = "exact",
    min_sigma: float = 1e-6,
    damping: float = 1e-3,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    event_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    r"""Fisher penalty δᵀF̂δ / d of a displacement, from the velocities of a flow at K samples.

    The same as ``fisher_penalty(displacement, velocity_to_score(velocity, x, t))``, with

        s_k = (α_t·v_k − α̇_t·x_k) / (σ_t·(α̇_t·σ_t − α_t·σ̇_t)),    F = (1/K) Σ_k s_k s_kᵀ + λI,

    but one Triton kernel reads velocities and samples once and writes no scores. The PyTorch path, and a call that
    needs gradients to ``velocity``, ``x`` or ``t``, compose the two functions.

    Args:
        displacement: δ, shape (..., d); float32, bfloat16, float16 or float64.
        velocity: v(x_k, t), shape (..., K, d), same leading shape and device.
        x: the K samples brought to time t, (..., K, d).
        t: time, a number in [0, 1] at which σ_t > 0, or a tensor that broadcasts to (..., K, 1); to (..., K, 1, 1) for
            chunks.
        path, convention, min_sigma: as in :func:`velocity_to_score`.
        damping, normalize, eps, reduction, event_dim: as in :func:`fisher_penalty`.
        backend: as in :func:`fisher_penalty`.

    Returns:
        Penalty (...), or a scalar; float64 if an input is, float32 otherwise. Differentiable in ``displacement``, and
        in ``velocity``, ``x`` and a tensor ``t`` if they require it. Intermediate scores are not rounded to half
        precision.

    Raises:
        TypeError: an argument has the wrong type, such as a tensor that is not floating point or not dense.
        ValueError: shapes do not fit, d or K is zero, devices differ, or an option is out of its range.
        RuntimeError: the backend asked for cannot serve these tensors.

    Source: "Fisher Decorator" (arXiv 2604.17919).

    Example:
        >>> import torch, fdkernels
        >>> velocity, x_t = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 0.0], [-3.0, 0.0]]])
        >>> step = torch.tensor([[0.1, 0.0]]), torch.tensor([[0.0, 0.1]])
        >>> [round(fdkernels.velocity_fisher_penalty(s, velocity, x_t, 0.5).item(), 7) for s in step]
        [0.0099997, 3e-07]
    """
    op = "velocity_fisher_penalty"
    check_floating(op, displacement=displacement, velocity=velocity, x=x)
    event_dim = check_event_dim(op, event_dim)
    check_samples(op, displacement, "velocity", velocity, event_dim)
    check_shape(op, "x", x, velocity.shape, f"velocity's shape (..., K, {form(event_dim)})")
    displacement, velocity, x = (flat(tensor, event_dim) for tensor in (displacement, velocity, x))
    score_rule = check_score_rule(op, path, convention, min_sigma)
    t = check_time(t, score_rule, velocity, velocity.shape[:-1], event_dim)
    rule = check_penalty_rule(op, damping, normalize, eps)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    triton = choose_backend(op, backend, displacement, velocity, x, max_d=MAX_PENALTY_D) == "triton"
    return reduce(penalty_from_velocity(displacement, velocity, x, t, score_rule, rule, triton), reduction)


def fisher_spectrum(score: Tensor, *, damping: float = 1e-3, event_dim: int = 1) -> Tensor:
    """Eigenvalues of F = (1/K) Σ_k s_k s_kᵀ + λI, largest first: how anisotropic the behaviour density is.

    A diagnostic, not for hot paths. ``spectrum[..., 0] / spectrum.sum(-1)`` is the share of the stiffest direction
    (1/d when isotropic); few samples exaggerate it, and K = 1 gives almost 1 for any density.

    Args:
        score: scores at K samples, (..., K, d); float32, bfloat16, float16 or float64.
        damping: λ ≥ 0.
        event_dim: as in :func:`fisher_penalty`; the scores of chunks are (..., K, horizon, width), and their
            eigenvalues (..., horizon·width).

    Returns:
        Eigenvalues (..., d), descending; float64 for a float64 input, float32 otherwise; NaN if a score of the row is
        NaN or infinite. Differentiable where the eigenvalues are distinct.

    Raises:
        TypeError: ``score`` is not a dense floating-point tensor, or ``damping`` is no number.
        ValueError: d or K is zero, or ``damping`` is out of its range.

    Example:
        >>> import torch, fdkernels
        >>> fdkernels.fisher_spectrum(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), damping=0.0)
        tensor([4.5000, 0.5000])
    """
    op = "fisher_spectrum"
    check_floating(op, score=score)
    event_dim = check_event_dim(op, event_dim)
    if score.ndim <= event_dim or 0 in score.shape[-event_dim - 1 :]:
        raise ValueError(
            f"{op}: score must be (..., K, {form(event_dim)}) with K and {sizes(event_dim)} of at least 1, "
            f"got {tuple(score.shape)}"
        )
    damping = check_at_least(op, "damping", damping, 0.0)
    score = flat(score, event_dim)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    with autocast(score.device, None):  # half precision makes small eigenvalues negative
        fisher = score.mT @ score / score.shape[-2]
        # one matrix that is not finite would make eigvalsh refuse the whole batch
        finite = fisher.isfinite().all(-1).all(-1)[..., None]
        spectrum = torch.linalg.eigvalsh(torch.where(finite[..., None], fisher, 0)).flip(-1) + damping
        return torch.where(finite, spectrum, torch.nan)
