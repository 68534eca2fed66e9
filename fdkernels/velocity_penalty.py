"""From a velocity network's own output straight to the Fisher penalty, without scores in between."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.fisher import (
    Normalize,
    Reduction,
    check_displacement,
    check_penalty_settings,
    penalty_from_score,
    reduce,
)
from fdkernels.operators import accumulate_dtype, velocity_penalty_operator
from fdkernels.paths import AffinePath
from fdkernels.score import (
    Convention,
    PathName,
    check_score_settings,
    check_time,
    score_coefficients,
    score_from_velocity,
)
from fdkernels.validation import check_floating, check_shape


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
    backend: Backend | None = None,
) -> Tensor:
    r"""Fisher penalty δᵀF̂δ / d of a displacement, from the velocities of a flow at K samples.

    The same as ``fisher_penalty(displacement, velocity_to_score(velocity, x, t))``, with

        s_k = (α_t·v_k − α̇_t·x_k) / (σ_t·(α̇_t·σ_t − α_t·σ̇_t)),    F = (1/K) Σ_k s_k s_kᵀ + λI,

    but one Triton kernel reads velocities and samples once and writes no scores. The PyTorch path, and a call that
    wants gradients to ``velocity``, ``x`` or ``t``, does compose the two functions.

    Args:
        displacement: δ, shape (..., d); float32, bfloat16, float16 or float64.
        velocity: v(x_k, t), shape (..., K, d), same leading shape and device.
        x: the K samples brought to time t, (..., K, d).
        t: time, a number in [0, 1] at which σ_t > 0, or a tensor that broadcasts to (..., K, 1).
        path, convention, min_sigma: as in :func:`velocity_to_score`.
        damping, normalize, eps, reduction: as in :func:`fisher_penalty`.
        backend: as in :func:`fisher_penalty`.

    Returns:
        Penalty (...), or a scalar; float64 where an input is, float32 otherwise. Differentiable in ``displacement``,
        and in ``velocity``, ``x`` and a tensor ``t`` where they require it. The scores are not rounded to half
        precision on the way.

    Raises:
        TypeError: a tensor is missing or not floating point.
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
    check_displacement(op, displacement, "velocity", velocity)
    check_shape(op, "x", x, velocity.shape, "velocity's shape (..., K, d)")
    resolved = check_score_settings(op, path, convention, min_sigma)
    check_time(op, t, resolved, velocity, (*velocity.shape[:-1], 1))
    check_penalty_settings(op, damping, normalize, eps, reduction)
    triton = choose_backend(op, backend, displacement, velocity, x) == "triton"
    penalty = penalty_from_velocity(
        displacement, velocity, x, t, resolved, convention, min_sigma, damping, normalize, eps, triton
    )
    return reduce(penalty, reduction)


def penalty_from_velocity(
    displacement: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    path: AffinePath,
    convention: Convention,
    min_sigma: float,
    damping: float,
    normalize: Normalize,
    eps: float,
    triton: bool,
) -> Tensor:
    """The penalty, on checked arguments."""
    constants = (velocity, x, t) if isinstance(t, Tensor) else (velocity, x)
    wants_more = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants)
    if triton and not wants_more:
        affine = score_coefficients(velocity, x, t, path, convention, min_sigma)
        settings = (float(damping), normalize == "trace", float(eps))
        return velocity_penalty_operator(displacement, velocity, x, *affine, *settings, False)[0]
    dtype = accumulate_dtype(velocity, x)  # the scores in between are not rounded to half precision
    score = score_from_velocity(velocity.to(dtype), x.to(dtype), t, path, convention, min_sigma, triton)
    return penalty_from_score(displacement, score, damping, normalize, eps, triton)
