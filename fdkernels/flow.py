"""Integrate the ODE of a flow policy, dx/dt = v(x, t, cond)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels import groups
from fdkernels.backend import Backend, Implementation, Precision, check_precision, check_way, choose_fused
from fdkernels.condition import Condition
from fdkernels.cpu import field as cpu_field
from fdkernels.events import check_event_dim, flat, shaped
from fdkernels.ops.integrate import fused_integrate
from fdkernels.paths import AffinePath, PathName
from fdkernels.solvers import Method, check_solver, integrate
from fdkernels.validation import MAX_COUNT, check_flag, is_sequence
from fdkernels.velocity import Velocity, bind, check_start


def integrate_flow(
    velocity: Velocity,
    x0: Tensor,
    cond: Condition = None,
    *,
    path: PathName | AffinePath = "linear",
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    return_path: bool = False,
    differentiable: bool = False,
    event_dim: int = 1,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    r"""Transport noise to actions along a flow: x_{i+1} = x_i + h_i·v(x_i, t_i, cond) for Euler.

    **No gradient runs through the solver unless** ``differentiable=True``: the Fisher decorator never needs one, and
    the result is a constant to autograd.

    For a :class:`VelocityMLP` or a packed MLP the condition's share of the first layer is computed once for each row
    of ``cond``, not at every step, and nothing is concatenated. On CUDA the whole solve is one launch or, for
    many rows, one CUDA graph. On a CPU it runs in the way that suits the processor (``cpu/processor.py``).

    Args:
        velocity: a :class:`VelocityMLP`, the result of :func:`pack_mlp`, or any callable v(x, t, cond) -> (..., d)
            with x (..., d), t (..., 1) in x's dtype and cond (..., c), expanded to x's leading shape.
        x0: start of the flow (..., d), at the first time of the grid.
        cond: condition (..., c), or None. Its leading shape broadcasts to x0's: with (B, 1, c) against (B, K, d) one
            state serves K samples. A callable may also take a tensor with more dimensions behind the leading ones, such
            as tokens (B, T, c). A plain tensor must be floating point. In a dict, tuple or list, tensors may have any
            dtype and need all leading dimensions; any other mapping reaches the callable as a dict, any other sequence
            as a list.
        path: the path that the flow was trained on, which says in which direction its time runs; as in
            :func:`velocity_to_score`. From noise to data, time runs from 0 to 1, but on ``"linear_reversed"`` and on
            an :class:`AffinePath` with its data at t = 0 from 1 to 0. Only the default of ``time_grid`` depends on it.
        num_steps: S; the times are i/S, i = 0 ... S, or the same backwards.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` (order 2) or ``"rk4"`` (order 4).
        time_grid: S + 1 times to use instead, in any direction and within ±10,000: a sequence, or a 1-d tensor (read on
            the host). The kernels keep half a kilobyte for each different grid on the device, for captured graphs.
        clip: bounds applied to the end of the path; None never clips.
        clip_each_step: apply them after every step. The inner stages of a step are never clipped.
        return_path: return the states at all times, (S + 1, ..., d), as stepped and clipped; x0 comes first, unchanged.
        differentiable: let autograd reach x0, cond and the weights if gradients are enabled. Each step is checkpointed:
            it adds only the state x to memory (and 5 kB, the state of the random generator), and the backward pass
            computes it again. The weights must not change in between.
        event_dim: how many of x0's last dimensions make one action: 2 for action chunks, x0 (..., horizon, d). A
            callable then gets them with one leading dimension, as networks over sequences want it: x (N, horizon, d),
            t (N, 1, 1), which broadcasts against x, and cond (N, ...). An MLP gets them flattened; its action_dim is
            horizon·d.
        precision: of the matrix products. ``None`` takes bfloat16 or float16 under autocast, otherwise the weights' own
            dtype; float32 products follow ``torch.set_float32_matmul_precision``. ``"bf16"`` takes bfloat16 for the
            hidden layers of a packed MLP; state, first layer and norms stay float32 (on CUDA the first layer's products
            are TF32 and the last layer's bfloat16; on the CPU both are float32). ``"highest"`` and ``"high"`` take
            float32, whatever autocast says; they differ on CUDA only (float32-accurate and TF32). A callable runs under
            autocast for ``"bf16"``, and without it for the other two.
        backend: ``None`` picks by device; ``"torch"`` and ``"triton"`` insist on one.
        implementation: how the kernels read the weights. Unless given, a table picks by rows, widths, precision and
            GPU. ``"stationary"``: groups of programs hold them on the chip for the whole solve; for few rows, and
            hidden layers of one power-of-two width without layer norm. ``"streamed"``: every program reads all of them
            at every evaluation; any network. ``"gemm"``: cuBLAS multiplies, layer by layer; for many rows. On the
            default stream its launches are recorded as a CUDA graph at the second call with the same shapes and
            weights, and replayed from then on; on other streams they become part of the graph that the caller captures.
            Its float32 products follow ``torch.set_float32_matmul_precision``. ``python -m fdkernels.tune`` measures
            the table.

    Returns:
        In x0's shape and dtype; with ``return_path`` (S + 1, ..., d). During the solve, the state of a packed MLP in
        half precision is float32.

    Raises:
        TypeError: an argument, or what velocity returns, has the wrong type, such as a tensor that is not floating
            point or not dense.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, or ``"high"`` or
            ``"bf16"`` is asked of float64.
        RuntimeError: the backend or the precision asked for is not available here.

    Example:
        >>> import torch, fdkernels
        >>> decay = lambda x, t, cond: -x
        >>> fdkernels.integrate_flow(decay, torch.ones(1, 1), num_steps=100, method="rk4")  # 1/e
        tensor([[0.3679]])
    """
    op = "integrate_flow"
    event_dim = check_event_dim(op, event_dim)
    event = check_start(op, x0, cond, "x0", "cond", event_dim)
    check_flag(op, "return_path", return_path)
    check_flag(op, "differentiable", differentiable)
    solver = check_solver(op, num_steps, time_grid, method, clip, clip_each_step, path)
    bound = bind(op, velocity, x0, precision, event)
    rows = flat(x0, event_dim)
    fused = choose_fused(op, backend, implementation, bound.packed, (rows,), differentiable)
    given = bound.check_rows(rows, cond, "x0", "cond", rows.ndim - 1)
    if fused:
        out = fused_integrate(bound.encoded(), rows, given, solver, return_path, bound.way(implementation))
        return shaped(out, event)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), bound.context(x0.device):
        field, x = bound.flow()(rows, given)
        return shaped(integrate(field, x, solver, return_path).to(x0.dtype), event)


def integrate_flow_groups(
    velocity: Velocity,
    x0s: Sequence[Tensor],
    conds: Sequence[Condition],
    *,
    path: PathName | AffinePath = "linear",
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    differentiable: bool = False,
    event_dim: int = 1,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> tuple[Tensor, ...]:
    """Integrate several groups of rows along the same flow: :func:`integrate_flow` of each, in one call.

    One update of an agent needs next actions (B, d), base actions (B, d) and Fisher samples (B, K, d), the last with
    one condition (B, 1, c) for K samples. The kernels take all rows at once, and so does a packed MLP on the CPU
    without gradients; otherwise the groups run one after another.

    Args:
        velocity: as in :func:`integrate_flow`.
        x0s: starts, one tensor (..., d) for each group; leading shapes may differ, device and dtype may not, nor the
            shapes of chunks.
        conds: as many conditions (..., c) or None, each broadcasting to its group's leading shape.
        path, num_steps, method, time_grid, clip, clip_each_step, differentiable, event_dim, precision, backend,
            implementation: as in :func:`integrate_flow`, for all groups.

    Returns:
        The ends, one (..., d) for each group, equal to those of separate calls up to rounding.

    Raises the errors of :func:`integrate_flow`; the message names the group.

    Example:
        >>> import torch, fdkernels
        >>> flow, obs = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32)), torch.randn(8, 17)
        >>> noises, obs_of = [torch.randn(8, 6), torch.randn(8, 4, 6)], [obs, obs.unsqueeze(1)]
        >>> [tuple(action.shape) for action in fdkernels.integrate_flow_groups(flow, noises, obs_of)]
        [(8, 6), (8, 4, 6)]
    """
    op = "integrate_flow_groups"
    event_dim = check_event_dim(op, event_dim)
    given, conds, event = _check_groups(op, x0s, conds, event_dim)
    check_flag(op, "differentiable", differentiable)
    solver = check_solver(op, num_steps, time_grid, method, clip, clip_each_step, path)
    if not given:  # nothing to do, but options are refused as ever
        check_way(op, backend, implementation)
        check_precision(op, precision)
        return ()
    x0s = [flat(x0, event_dim) for x0 in given]
    bound = bind(op, velocity, x0s[0], precision, event)
    fused = choose_fused(op, backend, implementation, bound.packed, x0s, differentiable)
    for i, (x0, cond) in enumerate(zip(x0s, conds)):
        bound.check_rows(x0, cond, f"x0s[{i}]", f"conds[{i}]", x0.ndim - 1)
    if fused:
        rows, cond = groups.join(x0s, conds)
        out = fused_integrate(bound.encoded(), rows, cond, solver, False, bound.way(implementation))
        return groups.split(out, given)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), bound.context(x0s[0].device):
        flow = bound.flow()
        if bound.packed is not None and cpu_field.serves(x0s[0]):
            field, x = flow(*groups.join(x0s, conds))
            return groups.split(integrate(field, x, solver).to(x0s[0].dtype), given)
        apart = []
        for x0, cond in zip(x0s, conds):
            field, x = flow(x0, cond)
            apart.append(shaped(integrate(field, x, solver).to(x0.dtype), event))
        return tuple(apart)


def _check_groups(
    op: str, x0s: Sequence[Tensor], conds: Sequence[Condition], event_dim: int
) -> tuple[list[Tensor], list[Any], tuple[int, ...]]:
    """Check that there are as many conditions as groups, and one dtype, device and event for all groups."""
    starts = list(itertools.islice(x0s, MAX_COUNT + 1)) if is_sequence(x0s) else None
    conditions = list(itertools.islice(conds, MAX_COUNT + 1)) if is_sequence(conds) else None
    if starts is None or conditions is None or len(starts) != len(conditions):
        raise ValueError(f"{op}: x0s and conds must be sequences of one length, one entry for each group of rows")
    if len(starts) > MAX_COUNT:
        raise ValueError(f"{op}: x0s and conds must hold at most {MAX_COUNT} groups, got more")
    event: tuple[int, ...] = ()
    for i, (x0, cond) in enumerate(zip(starts, conditions)):
        own = check_start(op, x0, cond, f"x0s[{i}]", f"conds[{i}]", event_dim)
        event = event or own
        if own != event and event_dim > 1:
            raise ValueError(f"{op}: all groups must have chunks of one shape, got x0s[{i}] of {own} and {event}")
        if (x0.dtype, x0.device) != (starts[0].dtype, starts[0].device):
            raise ValueError(
                f"{op}: all groups must have one dtype and device, got x0s[{i}] of {x0.dtype} on {x0.device} and "
                f"x0s[0] of {starts[0].dtype} on {starts[0].device}"
            )
    return starts, conditions, event
