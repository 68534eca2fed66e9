"""The pull-back metric: the size of δ measured where the flow starts, in noise, whose covariance is I."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from fdkernels_ref.flow import Velocity, integrate_flow
from fdkernels_ref.penalty import reduce_penalty


def flow_jacobian(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    since: float = 0.0,
    num_steps: int = 10,
    method: str = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The action a = clip(x_S) of `integrate_flow`, and J = (1 − t_m)·∂x_S/∂x_m, where t_m is the last time ≤ `since`.

    With `since=0`, J = ∂x_S/∂x0. On the linear path x_t = (1 − t)·x0 + t·a the noise has the weight 1 − t, so that J
    says how the action follows the noise that is left at time t_m. J·Jᵀ is the covariance of the action given x_m, to
    first order in that noise.

    Args:
        velocity, x0, cond, num_steps, method, time_grid: as in `integrate_flow`. A row of v depends on its own row
            of x only. The times rise.
        clip: bounds of a; J is that of the action before clipping.

    Returns:
        a, (..., d), and J, (..., d, d) with J[..., i, j] = (1 − t_m)·∂x_S[..., i]/∂x_m[..., j]; both constants.
    """
    times = [i / num_steps for i in range(num_steps + 1)] if time_grid is None else [float(t) for t in time_grid]
    first = max(m for m, t in enumerate(times[:-1]) if t <= since or m == 0)
    with torch.no_grad():
        x = x0
        if first > 0:
            x = integrate_flow(velocity, x, cond, method=method, time_grid=times[: first + 1], clip=None)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        end = integrate_flow(velocity, x, cond, method=method, time_grid=times[first:], clip=None)
        rows = [torch.autograd.grad(end[..., i].sum(), x, retain_graph=True)[0] for i in range(x.shape[-1])]
    jacobian = (1 - times[first]) * torch.stack(rows, dim=-2)
    action = end.detach()
    return action if clip is None else action.clamp(*clip), jacobian


def pullback_penalty(
    displacement: Tensor,
    jacobian: Tensor,
    *,
    damping: float = 1e-3,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """δᵀM̂δ/d with M = (J·Jᵀ + λ·I)⁻¹ and M̂ = M/max(tr M/d, ε). Without damping δᵀMδ = ‖J⁻¹δ‖².

    J·Jᵀ is the covariance of the behaviour around the action, λ the least variance that counts. For a Gaussian
    behaviour and `since=0`, M is the Fisher matrix Σ⁻¹ in the limit of many steps.

    Args:
        displacement: δ, (..., d).
        jacobian: J, (..., d, d), of `flow_jacobian`.
        damping: λ.
        normalize: "trace" for M̂, "none" for M itself.
        eps: ε, a lower bound on the divisor tr M/d.
        reduction: "none", or "mean" or "sum" over all leading dimensions.

    Returns:
        (...), or a scalar after a reduction. Differentiable in displacement and in jacobian.
    """
    d = displacement.shape[-1]
    identity = torch.eye(d, dtype=jacobian.dtype, device=jacobian.device)
    covariance = einsum(jacobian, jacobian, "... i k, ... j k -> ... i j") + damping * identity
    metric = torch.linalg.inv(covariance)
    if normalize == "trace":
        mean_eigenvalue = einsum(metric, "... i i -> ...") / d
        metric = metric / rearrange(mean_eigenvalue.clamp(min=eps), "... -> ... 1 1")
    elif normalize != "none":
        raise ValueError(f"pullback_penalty: normalize must be 'trace' or 'none', got {normalize!r}")
    quadratic = einsum(displacement, metric, displacement, "... i, ... i j, ... j -> ...")
    return reduce_penalty(quadratic / d, reduction)


def flow_pullback_penalty(
    velocity: Velocity,
    cond: Tensor,
    displacement: Tensor,
    noise: Tensor,
    *,
    since: float = 0.5,
    num_steps: int = 10,
    method: str = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    damping: float = 1e-3,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """`pullback_penalty` of a δ that is added to the flow's action from `noise`, with the Jacobian there.

    Args:
        velocity, cond: as in `integrate_flow`; cond is (..., c).
        displacement: δ, (..., d).
        noise: x0 of the action that δ is added to, (..., d).
        since, num_steps, method, time_grid: as in `flow_jacobian`.
        damping, normalize, eps, reduction: as in `pullback_penalty`.

    Returns:
        (...), or a scalar after a reduction. The gradient reaches displacement alone.
    """
    _, jacobian = flow_jacobian(
        velocity, noise, cond, since=since, num_steps=num_steps, method=method, time_grid=time_grid
    )
    return pullback_penalty(displacement, jacobian, damping=damping, normalize=normalize, eps=eps, reduction=reduction)
