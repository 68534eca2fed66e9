"""The paper's penalty from end to end: sample the flow, bring the samples to time t, take their scores, weigh δ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor

from fdkernels_ref.flow import Velocity, integrate_flow
from fdkernels_ref.paths import AffinePath, data_time, path_of
from fdkernels_ref.penalty import fisher_penalty
from fdkernels_ref.score import velocity_to_score


def flow_fisher_penalty(
    velocity: Velocity,
    cond: Tensor,
    displacement: Tensor,
    *,
    path: str | AffinePath = "linear",
    num_samples: int = 4,
    t: Tensor | float | None = None,
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
    """The paper's penalty δᵀF̂δ/d, with F from K fresh samples of the behaviour flow at each state.

        a_k = clip(flow(ε_k, s)),   x_k = σ_t·ε′_k + α_t·a_k,   s_k = score(v(x_k, t, s), x_k, t)

    On the linear path, the paper's, x_k = (1 − t)·ε′_k + t·a_k. Here s is the state and s_k a score. Tensors hold the
    K samples in the dimension before the last.

    Args:
        velocity: v(x, t, cond) as in `integrate_flow`; here x is (..., K, d), t (..., K, 1) and cond (..., K, c).
        cond: the states s, (..., c).
        displacement: δ, (..., d), as the policy proposes it, before the refined action is clipped.
        path: as in `velocity_to_score`.
        num_samples: K.
        t: the time at which the scores are taken, a float or a tensor that broadcasts to (..., K, 1). None is 0.05
            from the data's end of the path.
        num_steps, method, time_grid, clip, clip_each_step: as in `integrate_flow`.
        damping, normalize, eps, reduction: as in `fisher_penalty`.
        convention, min_sigma: as in `velocity_to_score`.
        noise: ε_k, (..., K, d), where the flow starts; drawn from N(0, I) in the dtype of displacement when None.
        bridge_noise: ε′_k, (..., K, d), the noise in x_k; likewise, drawn after `noise`.
        generator: draws both.
        return_score: return (penalty, score).

    Returns:
        (...), or a scalar after a reduction; with `return_score` also s_k, (..., K, d). Samples, velocities and scores
        are constants: the gradient, 2·F̂δ/d, reaches displacement alone.
    """
    *batch, d = displacement.shape

    def normal() -> Tensor:
        shape = (*batch, num_samples, d)
        return torch.randn(shape, generator=generator, dtype=displacement.dtype, device=displacement.device)

    with torch.no_grad():
        noise = normal() if noise is None else noise
        bridge_noise = normal() if bridge_noise is None else bridge_noise
        cond = repeat(cond, "... c -> ... k c", k=num_samples).expand(*batch, -1, -1)
        a = integrate_flow(
            velocity,
            noise,
            cond,
            path=path,
            num_steps=num_steps,
            method=method,
            time_grid=time_grid,
            clip=clip,
            clip_each_step=clip_each_step,
        )
        t = abs(data_time(path) - 0.05) if t is None else t
        t = torch.as_tensor(t, dtype=a.dtype, device=a.device).expand(*batch, num_samples, 1)
        x = path_of(path).sigma(t) * bridge_noise + path_of(path).alpha(t) * a
        v = velocity(x, t, cond)
        score = velocity_to_score(v, x, t, path=path, convention=convention, min_sigma=min_sigma)
    penalty = fisher_penalty(displacement, score, damping=damping, normalize=normalize, eps=eps, reduction=reduction)
    return (penalty, score) if return_score else penalty
