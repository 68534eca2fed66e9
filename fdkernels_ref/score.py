"""The score ∇ log p_t of the density of x_t, from the velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels_ref.paths import AffinePath, path_of


def velocity_to_score(
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    *,
    path: str | AffinePath = "linear",
    convention: str = "exact",
    min_sigma: float = 1e-6,
) -> Tensor:
    """The score ∇_x log p_t(x) of x_t = α_t·a + σ_t·x0, x0 ~ N(0, I), from v(x, t) = E[α̇_t·a + σ̇_t·x0 | x_t = x].

    By Tweedie's formula ∇ log p_t(x) = −E[x0 | x]/σ. Solving x = α·E[a | x] + σ·E[x0 | x] and
    v = α̇·E[a | x] + σ̇·E[x0 | x] for E[x0 | x] gives

        score = (α·v − α̇·x) / (σ·(α̇·σ − α·σ̇)),

    which is (t·v − x)/(1 − t) on the linear path. Only the first σ of the denominator is bounded below by `min_sigma`.
    The bracket keeps the true σ: on the linear path it is 1 at every t.

    Args:
        velocity: v, (..., d).
        x: x_t, (..., d).
        t: a float, or a tensor that broadcasts against x, such as (..., 1).
        path: a name in `PATHS` or an object with alpha, sigma, d_alpha, d_sigma.
        convention: "exact", or "velocity" for v/σ on the linear path. That is what the published code computes; it is
            not the score of any density, and is here to compare with that code.
        min_sigma: lower bound of the first σ. At t = 1 on the "vp" path the bracket is infinite and the score is 0.

    Returns:
        (..., d) in the dtype of velocity and x. Differentiable in velocity, x and t.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if convention == "velocity":
        if path != "linear":
            raise ValueError(
                f"velocity_to_score: convention 'velocity' is defined for path 'linear' only, got {path!r}"
            )
        return velocity / (1 - t).clamp(min=min_sigma)
    if convention != "exact":
        raise ValueError(f"velocity_to_score: convention must be 'exact' or 'velocity', got {convention!r}")
    p = path_of(path)
    alpha, sigma, d_alpha, d_sigma = p.alpha(t), p.sigma(t), p.d_alpha(t), p.d_sigma(t)
    bracket = d_alpha * sigma - alpha * d_sigma
    return (alpha * velocity - d_alpha * x) / (sigma.clamp(min=min_sigma) * bracket)
