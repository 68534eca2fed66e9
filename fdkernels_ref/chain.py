"""The whole chain of the paper's penalty: sample the flow, step back to time t, take scores, measure δ by their F."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor

from fdkernels_ref.flow import Velocity, integrate_flow
from fdkernels_ref.penalty import fisher_penalty
from fdkernels_ref.score import velocity_to_score


def flow_fisher_penalty(
    velocity: Velocity,
    cond: Tensor,
    displacement: Tensor,
    *,
    num_samples: int = 4,
    t: Tensor | float = 0.95,
    num_steps: int = 10,
    method: str = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    damping: float = 1e-3,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
    convention: str = "exact",
    min_sigma: float = 1e-6,
    noise: Tensor | None = None,
    bridge_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_score: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Penalty δᵀF̂δ/d, with F from K fresh samples of the behaviour flow at each state (the paper; linear path).

        a_k = clip(flow(s, ε_k)),   x_k = (1 − t)·ε′_k + t·a_k,   s_k = score(v(x_k, t, s), x_k, t)

    Args:
        velocity: v(x, t, cond) as in `integrate_flow`; here x is (..., K, d), t (..., K, 1) and cond (..., K, c).
        cond: the states, (..., c).
        displacement: δ, (..., d), as the policy proposes it, before any clipping of the action.
        num_samples: K.
        t: Fisher time; a float or a tensor that broadcasts to (..., K, 1).
        num_steps, method, time_grid, clip, clip_each_step: of the flow, as in `integrate_flow`.
        damping, normalize, eps, reduction: as in `fisher_penalty`.
        convention, min_sigma: as in `velocity_to_score`.
        noise: ε, (..., K, d), start of the flow; N(0, I) in the dtype of displacement when None.
        bridge_noise: ε′, (..., K, d), noise end of the path; the same, drawn after `noise`.
        generator: source of both.
        return_score: return (penalty, score).

    Returns:
        (...), a scalar after a reduction; with `return_score` also s_k, (..., K, d). Samples, velocity and score are
        constants: the gradient, 2·F̂δ/d, reaches displacement only.
    """
    *batch, d = displacement.shape

    def normal() -> Tensor:
        shape = (*batch, num_samples, d)
        return torch.randn(shape, generator=generator, dtype=displacement.dtype, device=displacement.device)

    with torch.no_grad():
        noise = normal() if noise is None else noise
        bridge_noise = normal() if bridge_noise is None else bridge_noise
        cond = repeat(cond, "... c -> ... k c", k=num_samples).expand(*batch, -1, -1)
        samples = integrate_flow(
            velocity,
            noise,
            cond,
            num_steps=num_steps,
            method=method,
            time_grid=time_grid,
            clip=clip,
            clip_each_step=clip_each_step,
        )
        t = torch.as_tensor(t, dtype=samples.dtype, device=samples.device).expand(*batch, num_samples, 1)
        x_t = (1 - t) * bridge_noise + t * samples
        v_t = velocity(x_t, t, cond)
        score = velocity_to_score(v_t, x_t, t, convention=convention, min_sigma=min_sigma)
    penalty = fisher_penalty(displacement, score, damping=damping, normalize=normalize, eps=eps, reduction=reduction)
    return (penalty, score) if return_score else penalty
