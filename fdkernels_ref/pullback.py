"""The pull-back metric: the size of δ measured in the noise that the flow would need to move an action by δ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from fdkernels_ref.flow import Velocity, integrate_flow
from fdkernels_ref.paths import AffinePath, data_time, path_of
from fdkernels_ref.penalty import normalize_fisher, reduce_penalty


def flow_jacobian(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    path: str | AffinePath = "linear",
    num_steps: int = 10,
    method: str = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The action a = clip(x_S) of `integrate_flow`, and J = ∂x_S/∂x0, differentiated through every step.

    Args:
        velocity, x0, cond, path, num_steps, method, time_grid: as in `integrate_flow`. A row of v depends on its own
            row of x only.
        clip: bounds of a; J is that of the action before clipping.

    Returns:
        a, (..., d), and J, (..., d, d) with J[..., i, j] = ∂x_S[..., i]/∂x0[..., j]; both constants.
    """
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        end = integrate_flow(
            velocity, x0, cond, path=path, num_steps=num_steps, method=method, time_grid=time_grid, clip=None
        )
        rows = [torch.autograd.grad(end[..., i].sum(), x0, retain_graph=True)[0] for i in range(x0.shape[-1])]
    action = end.detach()
    return action if clip is None else action.clamp(*clip), torch.stack(rows, dim=-2)


def pullback_metric(jacobian: Tensor, *, damping: float = 3e-4) -> Tensor:
    """M = (1/K)·Σ_k (J_k·J_kᵀ + λ·I)⁻¹.

    A change of noise ε by w moves the action by J·w. The behaviour around it has thus the covariance J·Jᵀ, since noise
    has the covariance I, and δᵀ(J·Jᵀ)⁻¹δ = ‖J⁻¹δ‖² is the squared length of the noise that δ takes.

    Args:
        jacobian: J_k, (..., K, d, d).
        damping: λ, the least variance that counts.

    Returns:
        (..., d, d), symmetric. Differentiable in jacobian.
    """
    covariance = einsum(jacobian, jacobian, "... i l, ... j l -> ... i j")
    identity = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return reduce(torch.linalg.inv(covariance + damping * identity), "... k i j -> ... i j", "mean")


def pullback_penalty(
    displacement: Tensor,
    jacobian: Tensor,
    *,
    damping: float = 3e-4,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """δᵀM̂δ/d with M̂ = M/max(tr M/d, ε): `fisher_penalty` with M in place of the Fisher matrix.

    Args:
        displacement: δ, (..., d).
        jacobian, damping: as in `pullback_metric`.
        normalize: "trace" for M̂, "none" for M itself.
        eps: ε, a lower bound on the divisor tr M/d.
        reduction: "none", or "mean" or "sum" over all leading dimensions.

    Returns:
        (...), or a scalar after a reduction. Differentiable in displacement and in jacobian.
    """
    metric = pullback_metric(jacobian, damping=damping)
    if normalize == "trace":
        metric = normalize_fisher(metric, eps=eps)
    elif normalize != "none":
        raise ValueError(f"pullback_penalty: normalize must be 'trace' or 'none', got {normalize!r}")
    quadratic = einsum(displacement, metric, displacement, "... i, ... i j, ... j -> ...")
    return reduce_penalty(quadratic / displacement.shape[-1], reduction)


def flow_pullback_penalty(
    velocity: Velocity,
    cond: Tensor,
    action: Tensor,
    displacement: Tensor,
    *,
    path: str | AffinePath = "linear",
    num_samples: int = 2,
    t: float | None = None,
    num_steps: int = 2,
    method: str = "euler",
    damping: float = 3e-4,
    normalize: str = "trace",
    eps: float = 1e-6,
    reduction: str = "none",
    bridge_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`pullback_penalty` of a δ that is added to ``action``, from K noisy views of that action.

        x_k = σ_t·ε_k + α_t·a,    J_k = ∂a_k/∂ε_k for the a_k that the flow carries x_k to = σ_t·∂a_k/∂x_k

    J_k·J_kᵀ is, to first order in the noise, the covariance of the behaviour given the view x_k. For a Gaussian and
    many steps it is Cov[a | x_k] itself, with the inverse −∇² log p(a) + (α_t/σ_t)²·I.

    Args:
        velocity, cond: as in `integrate_flow`; cond is (..., c).
        action: a, the action that δ is added to, (..., d).
        displacement: δ, (..., d).
        path: as in `velocity_to_score`.
        num_samples: K.
        t: the time of the views. None is 0.2 from the data's end of the path.
        num_steps: equal steps of the flow from t to the data's end.
        method: as in `integrate_flow`.
        damping, normalize, eps, reduction: as in `pullback_penalty`.
        bridge_noise: ε_k, (..., K, d); drawn from N(0, I) in the dtype of displacement when None.
        generator: draws it.

    Returns:
        (...), or a scalar after a reduction. The gradient reaches displacement alone.
    """
    *batch, d = displacement.shape
    if bridge_noise is None:
        shape = (*batch, num_samples, d)
        bridge_noise = torch.randn(shape, generator=generator, dtype=displacement.dtype, device=displacement.device)
    end = data_time(path)
    t = abs(end - 0.2) if t is None else t
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path_of(path).alpha(at), path_of(path).sigma(at)
    view = sigma * bridge_noise + alpha * rearrange(action, "... i -> ... 1 i")
    cond = repeat(cond, "... c -> ... k c", k=bridge_noise.shape[-2])
    times = [t + (end - t) * i / num_steps for i in range(num_steps + 1)]
    _, jacobian = flow_jacobian(velocity, view, cond, method=method, time_grid=times)
    return pullback_penalty(
        displacement, sigma * jacobian, damping=damping, normalize=normalize, eps=eps, reduction=reduction
    )
