"""The trust region measured in the noise that a flow would need to move an action: the pull-back of noise's metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdkernels.backend import Backend, Precision, choose_fused
from fdkernels.condition import Condition, check_condition, for_samples
from fdkernels.dtypes import accumulate_dtype
from fdkernels.events import check_event, check_event_dim, check_samples, flat, form, shaped
from fdkernels.jacobian import jacobian_along
from fdkernels.noise import check_source, draw
from fdkernels.paths import AffinePath, PathName, check_noise_left, data_time, levels, near_data, resolve_path
from fdkernels.records import REDUCTIONS, Normalize, PenaltyRule, Reduction, check_penalty_rule, reduce
from fdkernels.solvers import METHODS, Method, Solver
from fdkernels.validation import (
    as_float,
    brief,
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_shape,
)
from fdkernels.velocity import Velocity, bind


def pullback_penalty(
    displacement: Tensor,
    jacobian: Tensor,
    *,
    damping: float = 3e-4,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    event_dim: int = 1,
) -> Tensor:
    r"""Size δᵀM̂δ / d of a displacement, measured in the noise that a flow would need to move an action by it.

    With M = (1/K) Σ_k (J_k J_kᵀ + λI)⁻¹ and M̂ = M / max(tr M / d, ε). J_k maps a change of the noise to a change of the
    action, and noise has the metric I: for K = 1 and λ = 0, δᵀMδ = ‖J⁻¹δ‖². J Jᵀ is the covariance of the behaviour
    around the action, so that δᵀMδ is a squared Mahalanobis distance. If the behaviour is Gaussian, J is that of the
    whole flow and λ = 0, M is the Fisher matrix Σ⁻¹.

    Args:
        displacement: δ, shape (..., d); float32, bfloat16, float16 or float64.
        jacobian: J_k, (..., K, d, d), same leading shape and device, as from :func:`flow_jacobian`.
        damping: λ ≥ 0, a variance: directions in which the behaviour varies less count as if it varied so much.
        normalize: ``"trace"`` for M̂, which makes an isotropic M give mean(δ²); ``"none"`` for δᵀMδ / d.
        eps: ε > 0, lower bound of tr M / d.
        reduction: ``"none"`` keeps the leading shape; ``"mean"`` and ``"sum"`` give a scalar.
        event_dim: as in :func:`fisher_penalty`; for chunks δ (..., h, w) the Jacobians are (..., K, h, w, h, w).

    Returns:
        Penalty (...), or a scalar; float64 if an input is, float32 otherwise; computed in float64. Differentiable in
        ``displacement`` and in ``jacobian``, to any order. NaN for a row in which J Jᵀ + λI is not positive definite.

    Raises:
        TypeError: an argument has the wrong type, such as a tensor that is not floating point or not dense.
        ValueError: shapes do not fit, d or K is zero, devices differ, or an option is out of its range.

    Source: ours; the pull-back metric of latent-variable models (Arvanitidis et al., "Latent Space Oddity",
    arXiv 1710.11379) for the inverse of a flow.

    Example:
        >>> import torch, fdkernels
        >>> jacobian = torch.diag(torch.tensor([0.3, 0.03])).unsqueeze(0)  # the data vary little along the second axis
        >>> step = torch.tensor([0.1, 0.0]), torch.tensor([0.0, 0.1])
        >>> [round(fdkernels.pullback_penalty(s, jacobian).item(), 6) for s in step]
        [0.000131, 0.009869]
    """
    op = "pullback_penalty"
    check_floating(op, displacement=displacement, jacobian=jacobian)
    event_dim = check_event_dim(op, event_dim)
    event, lead = check_event(op, "displacement", displacement, event_dim), displacement.shape[:-event_dim]
    samples = jacobian.shape[-2 * event_dim - 1] if jacobian.ndim > 2 * event_dim else 0
    if not samples or jacobian.shape != (*lead, samples, *event, *event):
        square, own = ("d, d", f"d={event[0]}") if event_dim == 1 else ("*event, *event", f"event {event}")
        raise ValueError(
            f"{op}: jacobian must be (..., K, {square}) with K of at least 1, the displacement's {own} and its leading "
            f"shape {tuple(lead)}, got {tuple(jacobian.shape)}"
        )
    d = math.prod(event)
    displacement, jacobian = flat(displacement, event_dim), jacobian.reshape(*lead, samples, d, d)
    rule = check_penalty_rule(op, damping, normalize, eps)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    return reduce(_penalty(displacement, jacobian, rule), reduction)


def flow_pullback_penalty(
    velocity: Velocity,
    cond: Condition,
    action: Tensor,
    displacement: Tensor,
    *,
    path: PathName | AffinePath = "linear",
    num_samples: int = 2,
    t: float | None = None,
    num_steps: int = 2,
    method: Method = "euler",
    damping: float = 3e-4,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    bridge_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_jacobian: bool = False,
    event_dim: int = 1,
    precision: Precision | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Pull-back penalty of a displacement under the behaviour flow itself, around the action that it displaces.

    The action is brought back to time t by K fresh noises, x_k = σ_t·ε_k + α_t·a, and the flow carries these noisy
    views of it on to the end, a_k. The Jacobians J_k = ∂a_k/∂ε_k weigh the displacement (:func:`pullback_penalty`). On
    the linear path x_k = (1 − t)·ε_k + t·a.

    J_k J_kᵀ is the covariance of the behaviour given the view x_k, to first order in the noise. Where the behaviour is
    locally Gaussian, its inverse tends to −∇² log p(a) + (α_t/σ_t)²·I for many steps: the curvature of the density at
    the action, whose mean over actions is the Fisher matrix, and a constant. The default's two Euler steps exaggerate
    thin directions, which the damping bounds. Compared with :func:`flow_fisher_penalty` nothing is divided by σ_t, no
    flow is integrated from its start, and of several modes the metric sees the action's own. ``docs/science`` has
    measurements.

    Args:
        velocity: as in :func:`flow_jacobian`; a callable gets x (d, ..., K, d).
        cond: states, as in :func:`flow_fisher_penalty`.
        action: a, the actions that δ is added to, (..., d); any actions, of the flow or of the data.
        displacement: δ (..., d); all three have one leading shape and device.
        path: as in :func:`integrate_flow`.
        num_samples: K. Ignored if ``bridge_noise`` is given, whose K is used. A loss that draws fresh noise for every
            update averages over more.
        t: time of the views, in [0, 1] but not the data's end. Nearer the data is more local, farther resolves wider
            directions. None is 0.2 from the data's end: 0.8, and 0.2 on a path whose data are at t = 0.
        num_steps: equal steps of the flow from t to the data's end. (1 + d)·K·num_steps rows are evaluated for each
            state.
        method: as in :func:`integrate_flow`.
        damping, normalize, eps, reduction: as in :func:`pullback_penalty`.
        bridge_noise: ε_k, (..., K, d); drawn N(0, I) when None.
        generator: draws it in the dtype of ``cond``, or of the displacement if ``cond`` is not a tensor. PyTorch's
            global one when None.
        seed: draw it with a counter-based generator instead, as in :func:`flow_fisher_penalty`; positions 0 ... n − 1.
        return_jacobian: also return J_k (..., K, d, d).
        event_dim: as in :func:`flow_jacobian`. For chunks (..., h, w) this is also the shape of ``action``, ε_k are
            (..., K, h, w), J_k (..., K, h, w, h, w), and d is h·w.
        precision, backend: as in :func:`integrate_flow`.

    Returns:
        Penalty (...) or a scalar, and J_k when asked. Differentiable in ``displacement`` only.

    Raises:
        TypeError: an argument, or what velocity returns, has the wrong type.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, two options exclude each
            other, or velocity is not differentiable.
        RuntimeError: the backend or the precision asked for is not available here.

    Source: ours; see :func:`pullback_penalty`.

    Example:
        >>> import torch, fdkernels
        >>> flow = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32))
        >>> states, action, displacement = torch.randn(256, 17), torch.rand(256, 6), torch.zeros(256, 6)
        >>> fdkernels.flow_pullback_penalty(flow, states, action, displacement).shape
        torch.Size([256])
    """
    op = "flow_pullback_penalty"
    device = check_floating(op, action=action, displacement=displacement)
    event_dim = check_event_dim(op, event_dim)
    event, lead = check_event(op, "displacement", displacement, event_dim), displacement.shape[:-event_dim]
    check_condition(op, "cond", cond, lead, device, "the displacement", broadcasts=False)
    check_shape(op, "action", action, displacement.shape, f"(..., {form(event_dim)})")
    seed = check_source(op, seed, generator, device)
    if bridge_noise is None:
        shape = (*lead, check_count(op, "num_samples", num_samples), *event)
    else:
        check_floating(op, device, bridge_noise=bridge_noise)
        check_samples(op, displacement, "bridge_noise", bridge_noise, event_dim)
        shape = bridge_noise.shape
        check_count(op, "K, the number of samples in bridge_noise,", shape[len(lead)])
    resolved = resolve_path(op, path)
    t, end = _check_view(op, t, resolved), data_time(op, resolved)
    num_steps = check_count(op, "num_steps", num_steps)
    check_choice(op, "method", method, METHODS)
    rule = check_penalty_rule(op, damping, normalize, eps)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_flag(op, "return_jacobian", return_jacobian)
    bound = bind(op, velocity, action, precision, event)
    displacement, action = flat(displacement, event_dim), flat(action, event_dim)
    bridge_noise = flat(bridge_noise, event_dim)
    like = cond if isinstance(cond, Tensor) else displacement
    fused = choose_fused(op, backend, None, bound.packed, (displacement, like, action))
    bound.check_rows(action, cond, "action", "cond", len(lead))
    with torch.no_grad():
        noise = flat(draw(shape, like, generator, seed), event_dim) if bridge_noise is None else bridge_noise
        alpha, sigma = levels(op, resolved, t, device)
        view = sigma * noise.to(action.dtype) + alpha * action.unsqueeze(-2)
        times = [t + (end - t) * i / num_steps for i in range(num_steps)]
        solver = Solver([*times, end], method, 0.0, 0.0, "never")
        _, jacobian = jacobian_along(solver, bound, view, for_samples(cond, lead), fused)
        jacobian = sigma * jacobian
    penalty = reduce(_penalty(displacement, jacobian, rule), reduction)
    return (penalty, shaped(jacobian, event, event)) if return_jacobian else penalty


def _check_view(op: str, t: float | None, path: AffinePath) -> float:
    """The time of the views: a number in [0, 1] with noise left, and not the data's end."""
    if t is None:
        return near_data(op, path, 0.2)
    end = data_time(op, path)
    if not 0 <= as_float(t) <= 1 or as_float(t) == end:
        raise ValueError(f"{op}: t must be a number in {'[0, 1)' if end else '(0, 1]'}, got {brief(t)}")
    t = float(t)
    check_noise_left(op, path, t, "Jacobian")
    return t


def _penalty(displacement: Tensor, jacobian: Tensor, rule: PenaltyRule) -> Tensor:
    out, d = accumulate_dtype(displacement, jacobian), displacement.shape[-1]
    # in float64, for J·Jᵀ squares J's condition number, and the cost of matrices so small is not their arithmetic
    delta, jacobian = displacement.double(), jacobian.double()
    identity = torch.eye(d, dtype=torch.float64, device=jacobian.device)
    covariance = jacobian @ jacobian.mT + rule.damping * identity
    root, failed = torch.linalg.cholesky_ex(covariance)
    pivots, variances = (matrix.diagonal(dim1=-2, dim2=-1).detach() for matrix in (root, covariance))
    # a pivot that is only rounding is a singular matrix's
    sound = ((pivots.square() > d * torch.finfo(torch.float64).eps * variances).all(-1) & (failed == 0)).all(-1)
    inverse = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
    penalty = (inverse @ delta[..., None, :, None]).square().sum((-2, -1)).mean(-1)
    if rule.normalize:
        penalty = penalty / (inverse.square().sum((-2, -1)).mean(-1) / d).clamp(min=rule.eps)
    return torch.where(sound, penalty / d, torch.nan).to(out)
