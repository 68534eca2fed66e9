"""A flow as a sequence of launches: the library's matrix products for the hidden layers, a kernel for what is between.

For many rows, which keep the GPU busy in each launch. cuBLAS adds the bias and applies tanh-GELU as it writes a
product; other activations, layer norms and stacked networks take a launch or two more a layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fdkernels.kernels import launch
from fdkernels.kernels.architecture import Architecture, Penalty, Solver, device_table
from fdkernels.kernels.configs import FlowPlan, next_power_of_two
from fdkernels.kernels.hidden_layer import HiddenLayer
from fdkernels.kernels.turn import turn_kernel


def integrate(
    start: Tensor,
    cond: Tensor | None,
    parameters: list[Tensor | None],
    net: Architecture,
    plan: FlowPlan,
    solver: Solver,
    want_path: bool,
) -> tuple[Tensor]:
    """As ``launch_flow.integrate``."""
    models, rows, _ = start.shape
    path = start.new_empty(solver.num_steps + 1, *start.shape) if want_path else None
    end, _ = _solve(net, plan, solver, parameters, cond, (models, rows), path, start_ptr=start.contiguous())
    return (end.to(start.dtype) if path is None else path,)


def fisher(
    start: Tensor | None,
    bridge: Tensor | None,
    cond: Tensor | None,
    displacement: Tensor,
    coefficients: Tensor | None,
    seed: Tensor | None,
    parameters: list[Tensor | None],
    net: Architecture,
    plan: FlowPlan,
    solver: Solver,
    penalty: Penalty,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``launch_flow.fisher``."""
    num_samples, t, p, q, use_x, damping, normalize, eps, want_score = penalty
    models, states, d = displacement.shape
    x_t, velocity = _solve(
        net, plan, solver, parameters, cond, (models, states * num_samples), None,
        start_ptr=None if start is None else start.contiguous(),
        bridge_ptr=None if bridge is None else bridge.contiguous(), seed_ptr=seed,
        coefficient_ptr=None if coefficients is None else coefficients.contiguous(), t_bridge=t, FISHER=True,
    )  # fmt: skip
    samples = (models, states, num_samples, d)
    x_t, velocity = x_t.view(samples), velocity.view(samples)
    pairs = None if coefficients is None else coefficients[..., 1:].reshape(*samples[:-1], 2)
    score = launch.score(velocity, x_t, pairs, p, q, use_x) if want_score else x_t.new_empty(0)
    closed = launch.velocity_penalty(displacement, velocity, x_t, pairs, p, q, use_x, damping, normalize, eps, True)
    return *closed, score


UNUSED: dict[str, Any] = {
    **dict.fromkeys(("start_ptr", "bridge_ptr", "seed_ptr", "coefficient_ptr")),
    "t_bridge": 0.0,
    "FISHER": False,
}


def _solve(
    net: Architecture,
    plan: FlowPlan,
    solver: Solver,
    parameters: list[Tensor | None],
    cond: Tensor | None,
    shape: tuple[int, int],
    path: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """End of the flow, (models, rows, d) float32; of Fisher samples x_t, and the velocity there."""
    given = UNUSED | given
    models, rows = shape
    d, num_evals, dtype = net.action_dim, solver.num_evals, solver.hidden_dtype
    weights = [_stacked_once(p, 2) for p in parameters[::4] if p is not None]
    biases, scales, shifts = ([None if p is None else _stacked_once(p, 1) for p in parameters[i::4]] for i in (1, 2, 3))
    first, *middle = map(HiddenLayer, weights, biases, scales, shifts, net.activations, net.norms, net.norm_eps)
    middle = [layer.multiplying(dtype) for layer in middle]
    share = _condition_share(net, weights[0], biases[0], cond)

    def fresh(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(models, rows, width, dtype=dtype, device=share.device)

    x, total = fresh(d), fresh(d)
    take_turn = functools.partial(
        turn_kernel[(-(-rows // plan.rows), models)],
        **given,
        table_ptr=device_table(solver.table, x.device),
        x_ptr=x,
        total_ptr=total,
        first_weight_ptr=weights[0],
        share_ptr=share,
        last_weight_ptr=weights[-1],
        last_bias_ptr=biases[-1],
        num_evals=num_evals,
        num_rows=rows,
        rows_per_cond=models * rows // share[..., 0].numel(),
        D=d,
        BLOCK_D=max(16, next_power_of_two(d)),
        AT_X=net.column("x"),
        AT_T=net.column("t"),
        FAN_IN=net.cond_dim + d + 1,
        FIRST_WIDTH=net.widths[0],
        LAST_WIDTH=net.widths[-1],
        ACTIVATION=first.activation if first.norm == "none" else "none",
        PRECISION=solver.dot_precision,
        low=solver.low,
        high=solver.high,
        CLIP=solver.clip,
        ROWS=plan.rows,
        BLOCK_N=plan.block_n,
        BLOCK_INPUTS=plan.block_inputs,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )
    last_turn = num_evals + given["FISHER"]
    last_hidden, steps_done = None, 0
    for turn in range(last_turn + 1):
        step_ends = turn == 0 or (turn <= num_evals and solver.table[4 * turn - 1] > 0)
        h = None
        if turn < last_turn:
            h = fresh(net.widths[0], dtype if first.norm == "none" else torch.float32)
        with torch.cuda.device_of(x):
            take_turn(
                turn=turn,
                path_ptr=path[steps_done] if path is not None and step_ends else None,
                last_hidden_ptr=last_hidden,
                first_hidden_ptr=h,
                BEGINS=turn == 0,
                ENDS=turn == last_turn,
            )
        steps_done += step_ends
        if h is not None:
            h = h if first.norm == "none" else first.finish(h).to(dtype)
            for layer in middle:
                h = layer(h)
        last_hidden = h
    return x, total


def _stacked_once(parameter: Tensor, ndim: int) -> Tensor:
    """A network's parameter as it is, those of many (models, ...) however often they are stacked. Contiguous."""
    return (parameter.flatten(0, -ndim - 1) if parameter.ndim > ndim else parameter).contiguous()


def _condition_share(net: Architecture, weight: Tensor, bias: Tensor | None, cond: Tensor | None) -> Tensor:
    """o = W_cond·cond + b_1, (models, conds, width) float32; one row for all where there is no condition."""
    weight = weight.reshape(-1, *weight.shape[-2:])  # (models, width, inputs)
    if cond is None:
        share = weight.new_zeros((len(weight), 1, net.widths[0]), dtype=torch.float32)
    else:
        begin = net.column("cond")
        share = cond.float() @ weight[..., begin : begin + net.cond_dim].mT.float()
    return share if bias is None else share.add_(bias.reshape(len(weight), 1, -1))
