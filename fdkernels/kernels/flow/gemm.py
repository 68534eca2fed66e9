"""A flow as a sequence of launches: cuBLAS multiplies the hidden layers, and a kernel does the rest.

This is for many rows, which keep the GPU busy in each launch. cuBLAS adds the bias and applies tanh-GELU while it
writes a product; other activations, layer norms and stacked networks take one or two more launches per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkernels.kernels.flow.arguments import Bridge, Rows
from fdkernels.kernels.flow.timetable import Timetable
from fdkernels.kernels.flow.turn import turn_kernel
from fdkernels.kernels.penalty import launch as penalty_launch
from fdkernels.kernels.score import launch as score_launch
from fdkernels.kernels.tuning.plans import FlowPlan
from fdkernels.kernels.tuning.tiles import next_power_of_two
from fdkernels.layers import Architecture, EncodedNetwork, Layer
from fdkernels.records import Affine, PenaltyRule, TimedAffine
from fdkernels.torch_private import linear_gelu


class Inputs(NamedTuple):
    """Tensors that differ from call to call."""

    start: Tensor | None
    cond: Tensor | None
    seed: Tensor | None = None
    bridge: Tensor | None = None
    columns: Tensor | None = None
    displacement: Tensor | None = None


class Closing(NamedTuple):
    """How Fisher samples become scores and a penalty."""

    num_samples: int
    at: TimedAffine
    """Without its tensor, which is in :class:`Inputs`."""
    rule: PenaltyRule
    want_score: bool


class Solve(NamedTuple):
    """All other arguments. Equal ones launch the same kernels."""

    text: str
    """The encoded network's."""
    plan: FlowPlan
    table: Timetable
    want_path: bool
    closing: Closing | None = None


def integrate(inputs: Inputs, parameters: list[Tensor | None], solve: Solve) -> tuple[Tensor]:
    """As ``launch.integrate``."""
    start = inputs.start
    assert start is not None
    path = start.new_empty(solve.table.num_steps + 1, *start.shape) if solve.want_path else None
    end, _ = _solve(inputs, EncodedNetwork(parameters, solve.text), solve, start.shape[:2], path)
    return (end.to(start.dtype) if path is None else path,)


def fisher(inputs: Inputs, parameters: list[Tensor | None], solve: Solve) -> tuple[Tensor, Tensor, Tensor]:
    """As ``launch.fisher``."""
    displacement, closing = inputs.displacement, solve.closing
    assert displacement is not None
    assert closing is not None
    models, states, d = displacement.shape
    shape = models, states * closing.num_samples
    x_t, velocity = _solve(inputs, EncodedNetwork(parameters, solve.text), solve, shape, None)
    samples = (models, states, closing.num_samples, d)
    x_t, velocity = x_t.view(samples), velocity.view(samples)
    pairs = None if inputs.columns is None else inputs.columns[..., 3:].reshape(*samples[:-1], 2)
    affine = Affine(pairs, closing.at.p, closing.at.q, closing.at.use_x)
    score = score_launch.score(velocity, x_t, affine) if closing.want_score else x_t.new_empty(0)
    closed = penalty_launch.velocity_penalty(displacement, velocity, x_t, affine, closing.rule, True)
    return *closed, score


def _solve(
    inputs: Inputs, network: EncodedNetwork, solve: Solve, shape: tuple[int, ...], path: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The end of the flow, (models, rows, d) float32; for Fisher samples, x_t and the velocity there."""
    (models, rows), table, plan, net = shape, solve.table, solve.plan, network.architecture
    d, num_evals, dtype = net.action_dim, table.num_evals, table.hidden_dtype
    first, *middle, last = network.layers()
    middle = [layer.to(dtype) for layer in middle]
    plain_first = net.norms[0] == "none"  # then the turn applies the activation
    share = _condition_share(net, first, inputs.cond)

    def fresh(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(models, rows, width, dtype=dtype, device=share.device)

    x, total = fresh(d), fresh(d)
    given = inputs.start, inputs.bridge, inputs.columns
    start, noise, columns = (None if tensor is None else tensor.contiguous() for tensor in given)
    rows_given = Rows(start, inputs.seed, None, table.on(share.device))
    at = None if solve.closing is None else solve.closing.at
    bridge = None if at is None else Bridge(noise, columns, at.t, at.alpha, at.sigma)
    last_turn = num_evals + (bridge is not None)
    last_hidden, steps_done = None, 0
    for turn in range(last_turn + 1):
        step_ends = turn == 0 or (turn <= num_evals and table.lines[4 * turn - 1] > 0)
        h = fresh(net.widths[0], dtype if plain_first else torch.float32) if turn < last_turn else None
        with torch.cuda.device_of(x):
            turn_kernel[(-(-rows // plan.rows), models)](
                rows_given,
                bridge,
                x,
                total,
                path[steps_done] if path is not None and step_ends else None,
                last_hidden,
                h,
                first.weight,
                share,
                last.weight,
                last.bias,
                turn=turn,
                num_evals=num_evals,
                num_rows=rows,
                rows_per_cond=models * rows // share[..., 0].numel(),
                low=table.low,
                high=table.high,
                NET=net,
                PLAN=plan,
                BLOCK_D=max(16, next_power_of_two(d)),
                PRECISION=table.dot_precision,
                CLIP=table.clip,
                FISHER=bridge is not None,
                BEGINS=turn == 0,
                ENDS=turn == last_turn,
                num_warps=plan.num_warps,
            )
        steps_done += step_ends
        if h is not None:
            h = h if plain_first else first.finish(h).to(dtype)
            for layer in middle:
                h = _multiply(layer, h)
        last_hidden = h
    return x, total


def _multiply(layer: Layer, h: Tensor) -> Tensor:
    """Apply a hidden layer, (models, rows, in) -> (models, rows, out)."""
    weight, bias = layer.weight, layer.bias
    if weight.ndim == 3:
        product = h @ weight.mT
        product = product if bias is None else product.add_(bias.unsqueeze(1))
    elif h.is_cuda and bias is not None and layer[2:] == (None, "gelu_tanh", None):
        # cuBLAS applies GELU while writing the product. Its ReLU is not used: it is not documented to keep NaN.
        return linear_gelu(h[0], weight, bias).unsqueeze(0)
    else:
        product = F.linear(h, weight, bias)
    return layer.finish(product, norm_dtype=torch.float32).to(h.dtype)


def _condition_share(net: Architecture, first: Layer, cond: Tensor | None) -> Tensor:
    """o = W_cond·cond + b_1, (models, conds, width) float32; a single row if there is no condition."""
    weight, bias = first.weight.reshape(-1, *first.weight.shape[-2:]), first.bias  # (models, width, inputs)
    if cond is None:
        share = weight.new_zeros((len(weight), 1, net.widths[0]), dtype=torch.float32)
    else:
        share = cond.float() @ weight[..., net.at_cond : net.at_cond + net.cond_dim].mT.float()
    return share if bias is None else share.add_(bias.reshape(len(weight), 1, -1))
