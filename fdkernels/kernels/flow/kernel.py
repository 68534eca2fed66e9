"""Integrate dx/dt = v(x, t, cond) and, if asked, compute the Fisher penalty of a displacement, in one launch.

A program, or a group of SPLIT programs, owns ROWS rows for the whole solve; state, time and sums stay in registers. A
Runge-Kutta method is a table with one line for each evaluation of the velocity:

    v = v(z, time);  total += weight·v;  then, within a step:  z = x + reach·v
                                         at its end:          z = x = x + total, total = 0

The network therefore appears in the code once, for every method. Fisher samples take one more evaluation: at the end
of the solve z becomes x_t = σ·x0' + α·a, and the velocity there gives the score p·v + q·x_t.
"""

import triton
import triton.language as tl

from fdkernels.kernels.flow.advance import advance, noise
from fdkernels.kernels.flow.layers import condition_share
from fdkernels.kernels.flow.stationary import load_slices, stationary
from fdkernels.kernels.flow.streamed import streamed
from fdkernels.kernels.penalty.kernel import close_penalty


# Compilation takes seconds, so sizes are not compiled in.
@triton.jit(do_not_specialize=["num_states", "num_models", "rows_per_cond", "num_evals", "groups_per_model"])
def flow_kernel(
    rows, end_ptr, path_ptr, fisher, weights, scratch,
    num_states, num_models, rows_per_cond, num_evals, groups_per_model, low, high,
    NET: tl.constexpr, PLAN: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, CLIP: tl.constexpr, FISHER: tl.constexpr, NORMALIZE: tl.constexpr, USE_X: tl.constexpr,
):  # fmt: skip
    """
    Args:
        rows, fisher, weights, scratch: records of ``arguments.py``.
        end_ptr, path_ptr: where the samples, or their states at all times, are written; None if not wanted.
        FISHER: whether ``fisher`` is given; otherwise only samples are wanted.
        groups_per_model: groups of SPLIT programs, which walk over the model's blocks of ROWS rows.
        CLIP: "end", "step" or "never".
    """
    D: tl.constexpr = NET.action_dim
    WIDTH: tl.constexpr = NET.widths[0]
    ROWS: tl.constexpr = PLAN.rows
    SPLIT: tl.constexpr = PLAN.split
    BLOCK_N: tl.constexpr = PLAN.block_n
    STATES: tl.constexpr = ROWS // BLOCK_K
    program = tl.program_id(0)
    group = program // SPLIT
    part = program % SPLIT
    model = (group // groups_per_model).to(tl.int64)
    share_ptr = scratch.share + program.to(tl.int64) * (ROWS * WIDTH)
    hidden_ptr = scratch.hidden + group.to(tl.int64) * (2 * ROWS * NET.widest)
    if SPLIT > 1:
        partial_ptr = scratch.partial + group * (SPLIT * ROWS * BLOCK_D)
        counter_ptr = scratch.counter + group
        slices = load_slices(weights, model, part, NET, PLAN, hidden_ptr.dtype.element_ty, PRECISION)
    wide_ptr = scratch.wide
    if wide_ptr is not None:
        wide_ptr += program.to(tl.int64) * (ROWS * NET.widest)
    meetings = 0

    j = tl.arange(0, BLOCK_D)[None, :]
    r = tl.arange(0, ROWS)
    local_state = tl.arange(0, STATES)
    for block in tl.range(group % groups_per_model, tl.cdiv(num_states, STATES), groups_per_model, num_stages=1):
        state = block * STATES + local_state
        inside = state < num_states
        state = model * num_states + state
        k = r % BLOCK_K
        row_state = block * STATES + r // BLOCK_K
        keep = (k < K) & (row_state < num_states)
        row = (model * num_states + row_state) * K + k
        at, mask = row[:, None] * D + j, keep[:, None] & (j < D)
        total_size = num_models.to(tl.int64) * num_states * (K * D)
        writer = mask & (part == 0)

        # Each program of a group needs its own columns of the first layer.
        first_column = part * BLOCK_N
        last_column = first_column + BLOCK_N if SPLIT > 1 else WIDTH
        condition_share(
            rows.cond, row // rows_per_cond, keep, model, weights, share_ptr, first_column, last_column,
            NET, BLOCK_N, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()

        x = noise(rows.start, rows.seed, at, 0, mask)
        if path_ptr is not None:
            tl.store(path_ptr + at, x.to(path_ptr.dtype.element_ty), mask=writer)
        t_row = tl.zeros((ROWS,), tl.float32)
        alpha = tl.zeros((ROWS,), tl.float32)
        sigma = tl.zeros((ROWS,), tl.float32)
        p_row = tl.zeros((ROWS,), tl.float32)
        q_row = tl.zeros((ROWS,), tl.float32)
        if FISHER:
            if fisher.bridge.columns is not None:
                columns = fisher.bridge.columns + 5 * row
                t_row = tl.load(columns, mask=keep, other=0.0)
                alpha = tl.load(columns + 1, mask=keep, other=0.0)
                sigma = tl.load(columns + 2, mask=keep, other=0.0)
                p_row = tl.load(columns + 3, mask=keep, other=0.0)
                q_row = tl.load(columns + 4, mask=keep, other=0.0)
            else:
                t_row += fisher.bridge.t
                if fisher.bridge.alpha is None:
                    alpha, sigma = t_row, 1 - t_row
                else:
                    alpha += fisher.bridge.alpha
                    sigma += fisher.bridge.sigma
                p_row += fisher.p
                q_row += fisher.q
            bridge = noise(fisher.bridge.noise, rows.seed, at, total_size, mask)

        z = x
        v = tl.zeros((ROWS, BLOCK_D), tl.float32)
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        steps_done = 0
        if FISHER:
            if num_evals == 0:
                z = sigma[:, None] * bridge + alpha[:, None] * x
        # Fisher samples are evaluated once more, at x_t; that evaluation does not advance the state.
        for e in tl.range(0, num_evals + FISHER, num_stages=1):
            line = rows.table + 4 * tl.maximum(tl.minimum(e, num_evals - 1), 0)
            t = tl.zeros((ROWS,), tl.float32) + tl.load(line)
            if FISHER:
                t = tl.where(e < num_evals, t, t_row)
            if SPLIT > 1:
                v, meetings = stationary(
                    z, t, share_ptr, hidden_ptr, partial_ptr, counter_ptr, meetings, part, slices, model, weights,
                    NET, PLAN, PRECISION,
                )  # fmt: skip
            else:
                v = streamed(z, t, share_ptr, hidden_ptr, wide_ptr, model, weights, NET, PLAN, PRECISION)
            if e < num_evals:
                last = e == num_evals - 1
                x, total, z = advance(x, total, v, line, last, low, high, CLIP)
                if tl.load(line + 3) > 0:
                    steps_done += 1
                    if path_ptr is not None:
                        to = path_ptr + steps_done * total_size
                        tl.store(to + at, x.to(path_ptr.dtype.element_ty), mask=writer)
                    if FISHER:
                        if last:
                            z = sigma[:, None] * bridge + alpha[:, None] * x

        if end_ptr is not None:
            tl.store(end_ptr + at, x.to(end_ptr.dtype.element_ty), mask=writer)
        if FISHER:
            s = p_row[:, None] * v
            if USE_X:
                s += q_row[:, None] * z
            s = tl.where(mask, s, 0.0)
            if fisher.score is not None:
                tl.store(fisher.score + at, s.to(fisher.score.dtype.element_ty), mask=writer)
            state_at, state_mask = state[:, None] * D + j, inside[:, None] & (j < D)
            delta = tl.load(fisher.displacement + state_at, mask=state_mask, other=0.0).to(tl.float32)
            s = tl.reshape(s, (STATES, BLOCK_K, BLOCK_D))
            projection = tl.sum(s * delta[:, None, :], 2)
            squares = tl.sum(projection * projection, 1)
            size = tl.sum(tl.sum(s * s, 2), 1)
            pull = tl.sum(projection[:, :, None] * s, 1)
            penalty, gradient, _ = close_penalty(
                squares, size, pull, delta, fisher.damping, fisher.eps, K, D, NORMALIZE
            )  # fmt: skip
            tl.store(fisher.penalty + state, penalty, mask=inside & (part == 0))
            tl.store(fisher.gradient + state_at, gradient, mask=state_mask & (part == 0))
