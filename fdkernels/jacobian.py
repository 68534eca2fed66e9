"""How the end of a flow follows its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.backend import Backend, Precision, autocast, choose_fused
from fdkernels.condition import Condition
from fdkernels.dtypes import accumulate_dtype
from fdkernels.events import check_event_dim, flat, shaped
from fdkernels.ops.jacobian import fused_jacobian
from fdkernels.paths import AffinePath, PathName
from fdkernels.solvers import Method, Solver, check_solver, clipped, integrate
from fdkernels.velocity import BoundVelocity, Velocity, bind, check_start


def flow_jacobian(
    velocity: Velocity,
    x0: Tensor,
    cond: Condition = None,
    *,
    path: PathName | AffinePath = "linear",
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    event_dim: int = 1,
    precision: Precision | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Transport noise to actions along a flow, and differentiate each action by its noise: J = ∂x_S / ∂x_0.

    J is exact for the discrete steps, and that of the ODE in the limit of many. J·Jᵀ is the covariance of the action
    to first order in its noise, and log N(x0; 0, I) − log |det J| its log-density before clipping.

    d tangents go through the steps with the state; each costs as much as a row of :func:`integrate_flow`. For a packed
    MLP they are further rows of the same matrix products: one launch on CUDA. For any other velocity autograd finds the
    derivatives, at about three times the cost.

    Args:
        velocity: as in :func:`integrate_flow`. A row of its result may depend on its own row of x only. A callable
            must be differentiable in x, and gets x (d, ..., d) with cond expanded to that, or for chunks
            (d·N, horizon, width) with d = horizon·width. If it computes under ``torch.no_grad``, that is noticed in
            plain calls, but not under a compiler or a ``torch.func`` transform.
        x0: start of the flow (..., d), at the first time of the grid.
        cond: condition (..., c) whose leading shape broadcasts to x0's, or None, or what :func:`integrate_flow` takes.
        path, num_steps, method, time_grid, event_dim: as in :func:`integrate_flow`.
        clip: bounds of the action; J is that of the action before clipping.
        precision, backend: as in :func:`integrate_flow`.

    Returns:
        The action (..., d) in x0's dtype, and J (..., d, d) with J[..., i, j] = ∂x_S[..., i] / ∂x_0[..., j]; float64
        for float64 inputs, float32 otherwise. For chunks (..., h, w), J is (..., h, w, h, w). Both are constants to
        autograd (stop-gradient).

    Raises:
        TypeError: an argument, or what velocity returns, has the wrong type.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, or velocity is not
            differentiable.
        RuntimeError: the backend or the precision asked for is not available here.

    Example:
        >>> import torch, fdkernels
        >>> decay = lambda x, t, cond: -x
        >>> _, jacobian = fdkernels.flow_jacobian(decay, torch.ones(1), num_steps=100, method="rk4")  # 1/e
        >>> jacobian
        tensor([[0.3679]])
    """
    op = "flow_jacobian"
    event_dim = check_event_dim(op, event_dim)
    event = check_start(op, x0, cond, "x0", "cond", event_dim, least=1)
    solver = check_solver(op, num_steps, time_grid, method, clip, False, path)
    bound, rows = bind(op, velocity, x0, precision, event), flat(x0, event_dim)
    fused = choose_fused(op, backend, None, bound.packed, (rows,))
    bound.check_rows(rows, cond, "x0", "cond", rows.ndim - 1)
    end, jacobian = jacobian_along(solver, bound, rows, cond, fused)
    return shaped(end, event), shaped(jacobian, event, event)


def jacobian_along(
    solver: Solver, bound: BoundVelocity, x0: Tensor, cond: Condition, fused: bool
) -> tuple[Tensor, Tensor]:
    """The action and J of :func:`flow_jacobian`, for checked arguments and rows x0 (..., d)."""
    with torch.no_grad():
        if fused:
            assert cond is None or isinstance(cond, Tensor), "check_rows checks this"
            end, jacobian = fused_jacobian(bound.encoded(), x0, cond, solver, bound.way(None))
        else:
            with bound.context(x0.device):
                end, jacobian = _in_pytorch(solver, bound, x0, cond)
        return end.to(x0.dtype), jacobian.to(accumulate_dtype(x0))


def _in_pytorch(solver: Solver, bound: BoundVelocity, x0: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    x, field = bound.tangent_field(x0, cond)
    d = x.shape[-1]
    unit = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *(1,) * (x.ndim - 1), d).expand(d, *x.shape)
    # The tangents of a step are linear in those before it, so that one solver serves them and the state.
    unclipped = Solver(solver.times, solver.method, 0.0, 0.0, "never")
    with autocast(x.device, None):  # in float16, it cannot join bfloat16
        start = torch.cat([x.unsqueeze(0), unit])
    rows = integrate(field, start, unclipped)
    end = rows[0] if solver.clip == "never" else clipped(rows[0], solver)
    return end, rows[1:].movedim(0, -1)
