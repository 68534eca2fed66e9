"""How the end of a flow follows its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.backend import Backend, Precision, autocast, choose_fused
from fdkernels.dtypes import accumulate_dtype
from fdkernels.ops.jacobian import fused_jacobian
from fdkernels.solvers import Method, Solver, check_solver, clipped, integrate
from fdkernels.velocity import BoundVelocity, Velocity, bind, check_start


def flow_jacobian(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
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
            must be differentiable in x, and gets x (d, ..., d) with cond expanded to that. If it computes under
            ``torch.no_grad``, that is noticed in plain calls, but not under a compiler or a ``torch.func`` transform.
        x0: start of the flow (..., d), at the first time of the grid.
        cond: condition (..., c) whose leading shape broadcasts to x0's, or None.
        num_steps, method, time_grid: as in :func:`integrate_flow`.
        clip: bounds of the action; J is that of the action before clipping.
        precision, backend: as in :func:`integrate_flow`.

    Returns:
        The action (..., d) in x0's dtype, and J (..., d, d) with J[..., i, j] = ∂x_S[..., i] / ∂x_0[..., j]; float64
        for float64 inputs, float32 otherwise. Both are constants to autograd (stop-gradient).

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
    check_start(op, x0, cond, "x0", "cond")
    if x0.shape[-1] == 0:
        raise ValueError(f"{op}: x0 must be (..., d) with d of at least 1, got {tuple(x0.shape)}")
    solver = check_solver(op, num_steps, time_grid, method, clip, False)
    bound = bind(op, velocity, x0, precision)
    fused = choose_fused(op, backend, None, bound.packed, (x0,))
    bound.check_rows(x0, cond, "x0", "cond")
    return jacobian_along(solver, bound, x0, cond, fused)


def jacobian_along(
    solver: Solver, bound: BoundVelocity, x0: Tensor, cond: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor]:
    """The action and J of :func:`flow_jacobian`, for checked arguments."""
    with torch.no_grad():
        if fused:
            end, jacobian = fused_jacobian(bound.encoded(), x0, cond, solver, bound.way(None))
        else:
            with bound.context(x0.device):
                end, jacobian = _in_pytorch(solver, bound, x0, cond)
        return end.to(x0.dtype), jacobian.to(accumulate_dtype(x0))


def _in_pytorch(solver: Solver, bound: BoundVelocity, x0: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
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
