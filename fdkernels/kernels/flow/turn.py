"""The part of a solve between the hidden layers of one evaluation, which a library multiplies, and those of the next.

Turn e ends evaluation e - 1 of the velocity, v = W_out·h + b_out, advances the state by line e - 1 of the solver's
table, and begins evaluation e, h = act(W_x·z + W_t·t + o). The state is a few numbers a row; most of the traffic is h.
"""

import triton
import triton.language as tl

from fdkernels.kernels.activate import activate
from fdkernels.kernels.flow.advance import advance, noise
from fdkernels.kernels.flow.layers import first_layer, load_bias, product


@triton.jit(do_not_specialize=["turn", "num_evals", "num_rows", "rows_per_cond"])
def turn_kernel(
    rows, bridge, x_ptr, total_ptr, path_ptr, last_hidden_ptr, first_hidden_ptr,
    first_weight_ptr, share_ptr, last_weight_ptr, last_bias_ptr,
    turn, num_evals, num_rows, rows_per_cond, low, high,
    NET: tl.constexpr, PLAN: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, CLIP: tl.constexpr,
    FISHER: tl.constexpr, BEGINS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """
    Args:
        rows, bridge: records of ``arguments.py``; ``bridge`` is for FISHER samples.
        x_ptr, total_ptr: (models·rows, d) float32, the state and the sum within a step. For Fisher samples
            they hold x_t and the velocity there at the end.
        path_ptr: where the state is written, if this turn ends a step and the path is wanted.
        last_hidden_ptr, first_hidden_ptr: (models·rows, width) activations, one read and the other written.
        share_ptr: o, (models·rows / rows_per_cond, width) float32.
        turn: from 0 to ``num_evals``, and one more for Fisher samples. BEGINS and ENDS mark the first and last.
    """
    ROWS: tl.constexpr = PLAN.rows
    BLOCK_N: tl.constexpr = PLAN.block_n
    D: tl.constexpr = NET.action_dim
    FIRST_WIDTH: tl.constexpr = NET.widths[0]
    LAST_WIDTH: tl.constexpr = NET.widths[len(NET.widths) - 1]
    NORM: tl.constexpr = NET.norms[0]
    ACTIVATION: tl.constexpr = NET.activations[0] if NORM == "none" else "none"
    model = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = model * num_rows + tl.minimum(r, num_rows - 1)  # rows beyond the last read its numbers and write none
    j = tl.arange(0, BLOCK_D)
    at, mask = row[:, None] * D + j[None, :], (r < num_rows)[:, None] & (j < D)[None, :]

    if BEGINS:
        x = noise(rows.start, rows.seed, at, 0, mask)
        total, z = tl.zeros((ROWS, BLOCK_D), tl.float32), x
    else:
        v = tl.zeros((ROWS, BLOCK_D), tl.float32) + load_bias(last_bias_ptr, model, j, D)
        v = product(
            v, last_hidden_ptr, row, model, last_weight_ptr, j, LAST_WIDTH, D, PLAN, PRECISION, ROUNDED=False
        )  # fmt: skip
    if FISHER and ENDS:
        tl.store(total_ptr + at, v, mask=mask)
    else:
        arrived = turn == num_evals
        if not BEGINS:
            x = tl.load(x_ptr + at, mask=mask, other=0.0)
            total = tl.load(total_ptr + at, mask=mask, other=0.0)
            x, total, z = advance(x, total, v, rows.table + 4 * (turn - 1), arrived, low, high, CLIP)
        tl.store(x_ptr + at, x, mask=mask)
        if path_ptr is not None:
            tl.store(path_ptr + at, x.to(path_ptr.dtype.element_ty), mask=mask)
    if not ENDS:
        tl.store(total_ptr + at, total, mask=mask)
        line = rows.table + 4 * tl.maximum(tl.minimum(turn, num_evals - 1), 0)
        t = tl.zeros((ROWS,), tl.float32) + tl.load(line)
        if FISHER:
            if arrived:
                if bridge.columns is None:
                    t = tl.zeros((ROWS,), tl.float32) + bridge.t
                    if bridge.alpha is None:
                        alpha, sigma = t, 1 - t
                    else:
                        alpha = tl.zeros((ROWS,), tl.float32) + bridge.alpha
                        sigma = tl.zeros((ROWS,), tl.float32) + bridge.sigma
                else:
                    t = tl.load(bridge.columns + 5 * row)
                    alpha = tl.load(bridge.columns + 5 * row + 1)
                    sigma = tl.load(bridge.columns + 5 * row + 2)
                first = tl.num_programs(1).to(tl.int64) * num_rows * D
                z = sigma[:, None] * noise(bridge.noise, rows.seed, at, first, mask) + alpha[:, None] * x
                tl.store(x_ptr + at, z, mask=mask)
        for n0 in tl.range(0, FIRST_WIDTH, BLOCK_N, num_stages=1):
            n = n0 + tl.arange(0, BLOCK_N)
            h = first_layer(z, t, row // rows_per_cond, n, model, first_weight_ptr, share_ptr, NET, PRECISION)
            h = activate(h, ACTIVATION).to(first_hidden_ptr.dtype.element_ty)
            to = row[:, None] * FIRST_WIDTH + n[None, :]
            tl.store(first_hidden_ptr + to, h, mask=(r < num_rows)[:, None] & (n < FIRST_WIDTH)[None, :])
