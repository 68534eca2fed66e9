"""The whole chain of the Fisher decorator: sample the behaviour flow, score the samples, weigh a displacement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.fisher import Normalize, Reduction, fisher_penalty
from fdkernels.flow import (
    STEPS,
    Method,
    Precision,
    Velocity,
    check_clip,
    check_precision,
    check_time_grid,
    integrate,
    velocity_field,
)
from fdkernels.paths import PATHS
from fdkernels.score import Convention, check_time, score_from_velocity
from fdkernels.validation import check_at_least, check_choice, check_count, check_floating, check_shape


def flow_fisher_penalty(
    velocity: Velocity,
    cond: Tensor,
    displacement: Tensor,
    *,
    num_samples: int = 4,
    t: float | Tensor = 0.95,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    damping: float = 1e-3,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    convention: Convention = "exact",
    min_sigma: float = 1e-6,
    noise: Tensor | None = None,
    bridge_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_score: bool = False,
    precision: Precision | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Fisher penalty of a displacement under the behaviour flow itself.

    For each state, K samples a_k of the flow are brought to time t by fresh noise, x_k = (1−t)·x0_k + t·a_k; the
    velocity there gives the score s_k (:func:`velocity_to_score`), and the scores weigh the displacement
    (:func:`fisher_penalty`).

    Args:
        velocity: as in :func:`integrate_flow`; a callable gets x (..., K, d), t (..., K, 1), cond (..., K, c).
        cond: states (..., c).
        displacement: δ (..., d), same leading shape and device.
        num_samples: K. Ignored when ``noise`` or ``bridge_noise`` says it.
        t: where the score is taken, a number in [0, 1) or a tensor that broadcasts to (..., K, 1); see
            :func:`velocity_to_score`.
        num_steps, method, time_grid, clip: of the flow, as in :func:`integrate_flow`; the grid runs from noise to data.
        damping, normalize, eps, reduction: as in :func:`fisher_penalty`.
        convention, min_sigma: as in :func:`velocity_to_score`.
        noise: where the samples start, (..., K, d); N(0, I) from ``generator`` when None.
        bridge_noise: x0_k of the bridge, (..., K, d); likewise, drawn after ``noise``.
        generator: for what is drawn here, in the dtype of ``cond``.
        return_score: also return the scores (..., K, d).
        precision, backend: as in :func:`integrate_flow`.

    Returns:
        Penalty (...) or a scalar, and the scores when asked. Differentiable in ``displacement`` only: samples,
        velocities and scores are constants (stop-gradient), as in the published method.

    Raises:
        TypeError: a tensor is not floating point, velocity is not callable.
        ValueError: shapes do not fit, devices differ, or an option is out of its range.

    Source: "Fisher Decorator" (arXiv 2604.17919).

    Example:
        >>> import torch, fdkernels
        >>> flow = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32))
        >>> states, displacement = torch.randn(256, 17), torch.zeros(256, 6, requires_grad=True)
        >>> fdkernels.flow_fisher_penalty(flow, states, displacement, num_samples=4).shape
        torch.Size([256])
    """
    op = "flow_fisher_penalty"
    check_floating(op, cond=cond, displacement=displacement, noise=noise, bridge_noise=bridge_noise)
    if displacement.ndim == 0 or displacement.shape[-1] == 0:
        raise ValueError(f"{op}: displacement must be (..., d) with d of at least 1, got {tuple(displacement.shape)}")
    lead, d = displacement.shape[:-1], displacement.shape[-1]
    if cond.ndim == 0 or cond.shape[:-1] != lead:
        raise ValueError(
            f"{op}: cond must be (..., c) with the displacement's leading shape {tuple(lead)}, got {tuple(cond.shape)}"
        )
    for given in (noise, bridge_noise):
        if given is not None and given.ndim >= 2:
            num_samples = given.shape[-2]
            break
    check_count(op, "num_samples", num_samples)
    shape = (*lead, num_samples, d)
    for name, given in (("noise", noise), ("bridge_noise", bridge_noise)):
        if given is not None:
            check_shape(op, name, given, shape, "(..., K, d)")
    linear = PATHS["linear"]
    check_time(op, t, linear, displacement, torch.Size((*lead, num_samples, 1)))
    check_choice(op, "convention", convention, ("exact", "velocity"))
    check_choice(op, "method", method, STEPS)
    check_at_least(op, "min_sigma", min_sigma, 0.0)
    check_clip(op, clip)
    check_precision(op, precision)
    choose_backend(op, backend)
    times = check_time_grid(op, num_steps, time_grid)

    dtype, device = cond.dtype, cond.device
    with torch.no_grad():
        if noise is None:
            noise = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        if bridge_noise is None:
            bridge_noise = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        field = velocity_field(op, velocity, noise, cond.unsqueeze(-2).expand(*lead, num_samples, cond.shape[-1]))
        sample = integrate(field, noise, times, method, clip)
        if isinstance(t, Tensor):
            t = t.to(sample.dtype)
        x_t = (1 - t) * bridge_noise + t * sample
        score = score_from_velocity(field(x_t, t), x_t, t, linear, convention, min_sigma)
    penalty = fisher_penalty(
        displacement, score, damping=damping, normalize=normalize, eps=eps, reduction=reduction, backend=backend
    )
    return (penalty, score) if return_score else penalty
