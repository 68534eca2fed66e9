"""Integrate dx/dt = v(x, t, cond), and on to the Fisher penalty of a displacement, in one launch.

A program, or a group of SPLIT programs, owns ROWS rows for the whole solve; state, time and sums stay in registers. A
Runge-Kutta method is a table with a line for each evaluation of the velocity:

    v = v(z, time);  total += weight·v;  and then, within a step:  z = x + reach·v
                                         at its end:              z = x = x + total, total = 0

so that the network stands in the code once, for every method. Fisher samples take one evaluation more: at the end of
the solve z becomes x_t = (1 − t)·x0' + t·a, and the velocity there the score p·v + q·x_t.
"""

import triton
import triton.language as tl

from fdkernels.kernels.networks import condition_share, load_slices, stationary, streamed
from fdkernels.kernels.penalty import close_penalty
from fdkernels.kernels.solver import advance, noise


# Compilation takes seconds: sizes are not built in.
@triton.jit(do_not_specialize=["num_states", "num_models", "rows_per_cond", "num_evals", "groups_per_model"])
def flow_kernel(
    start_ptr, cond_ptr, table_ptr, seed_ptr, weights, biases, scales, shifts, norm_eps,
    displacement_ptr, bridge_ptr, coefficient_ptr,
    end_ptr, path_ptr, score_ptr, penalty_ptr, gradient_ptr,
    share_ptr, hidden_ptr, wide_ptr, partial_ptr, counter_ptr,
    num_states, num_models, rows_per_cond, num_evals, groups_per_model, low, high, t_bridge, p, q, damping, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    COND: tl.constexpr, AT_COND: tl.constexpr, AT_X: tl.constexpr, AT_T: tl.constexpr,
    WIDTHS: tl.constexpr, WIDEST: tl.constexpr,
    ACTIVATIONS: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
    CLIP: tl.constexpr, FISHER: tl.constexpr, NORMALIZE: tl.constexpr, USE_X: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """
    Args:
        start_ptr: rows of noise x0, all of a model's states with their K samples, then the next model's. None draws
            them here from the seed.
        table_ptr: (num_evals, 4) float32, a line for each evaluation of the solve: time, reach, weight (step size
            included), and 1 where a step ends. No lines: the rows of ``start_ptr`` are finished samples.
        weights, biases, scales, shifts: a pointer for each layer, the output layer last; (models, ...) stacked.
        displacement_ptr ... eps: of the Fisher part, see ``penalty_kernel``. ``coefficient_ptr`` holds (t, p, q) of
            each row where they are not one for all; bridge_ptr None draws x0' here.
        share_ptr ... counter_ptr: scratch, see ``streamed`` and ``stationary``. The counters, one a group, are zero.
        groups_per_model: groups of SPLIT programs; they walk over the model's blocks of ROWS rows.
        CLIP: "end", "step" or "never".
    """
    DEPTH: tl.constexpr = len(WIDTHS)
    FAN_IN: tl.constexpr = COND + D + 1
    STATES: tl.constexpr = ROWS // BLOCK_K
    program = tl.program_id(0)
    group = program // SPLIT
    part = program % SPLIT
    model = (group // groups_per_model).to(tl.int64)
    share_ptr += program.to(tl.int64) * (ROWS * WIDTHS[0])
    hidden_ptr += group.to(tl.int64) * (2 * ROWS * WIDEST)
    if SPLIT > 1:
        partial_ptr += group * (SPLIT * ROWS * BLOCK_D)
        counter_ptr += group
        slices = load_slices(
            weights, model, part, DEPTH, WIDEST, SPLIT, BLOCK_INPUTS, hidden_ptr.dtype.element_ty, PRECISION
        )  # fmt: skip
    elif wide_ptr is not None:
        wide_ptr += program.to(tl.int64) * (ROWS * WIDEST)
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

        # Of a group's programs, each needs its own columns of the first layer.
        first_column = part * BLOCK_N
        last_column = first_column + BLOCK_N if SPLIT > 1 else WIDTHS[0]
        condition_share(
            cond_ptr, row // rows_per_cond, keep, model, weights[0], biases[0], share_ptr, first_column, last_column,
            COND, AT_COND, FAN_IN, WIDTHS[0], BLOCK_N, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()

        x = noise(start_ptr, seed_ptr, at, 0, mask)
        if path_ptr is not None:
            tl.store(path_ptr + at, x.to(path_ptr.dtype.element_ty), mask=writer)
        t_row = tl.zeros((ROWS,), tl.float32) + t_bridge
        p_row = tl.zeros((ROWS,), tl.float32) + p
        q_row = tl.zeros((ROWS,), tl.float32) + q
        if FISHER:
            if coefficient_ptr is not None:
                t_row = tl.load(coefficient_ptr + 3 * row, mask=keep, other=0.0)
                p_row = tl.load(coefficient_ptr + 3 * row + 1, mask=keep, other=0.0)
                q_row = tl.load(coefficient_ptr + 3 * row + 2, mask=keep, other=0.0)
            bridge = noise(bridge_ptr, seed_ptr, at, total_size, mask)

        z = x
        v = tl.zeros((ROWS, BLOCK_D), tl.float32)
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        steps_done = 0
        if FISHER:
            if num_evals == 0:
                z = (1 - t_row)[:, None] * bridge + t_row[:, None] * x
        # Fisher samples are evaluated once more, at x_t; what that turn does to the state is not used.
        for e in tl.range(0, num_evals + FISHER, num_stages=1):
            line = table_ptr + 4 * tl.maximum(tl.minimum(e, num_evals - 1), 0)
            t = tl.zeros((ROWS,), tl.float32) + tl.load(line)
            if FISHER:
                t = tl.where(e < num_evals, t, t_row)
            if SPLIT > 1:
                v, meetings = stationary(
                    z, t, share_ptr, hidden_ptr, partial_ptr, counter_ptr, meetings, part, slices, model, weights,
                    biases, D, AT_X, AT_T, FAN_IN, DEPTH, WIDEST, ACTIVATIONS, PRECISION,
                    ROWS, SPLIT, BLOCK_INPUTS,
                )  # fmt: skip
            else:
                v = streamed(
                    z, t, share_ptr, hidden_ptr, wide_ptr, model, weights, biases, scales, shifts, norm_eps,
                    D, AT_X, AT_T, FAN_IN, WIDTHS, WIDEST, ACTIVATIONS, NORMS, PRECISION,
                    ROWS, BLOCK_N, BLOCK_INPUTS, STAGES,
                )  # fmt: skip
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
                            z = (1 - t_row)[:, None] * bridge + t_row[:, None] * x

        if end_ptr is not None:
            tl.store(end_ptr + at, x.to(end_ptr.dtype.element_ty), mask=writer)
        if FISHER:
            s = p_row[:, None] * v
            if USE_X:
                s += q_row[:, None] * z
            s = tl.where(mask, s, 0.0)
            if score_ptr is not None:
                tl.store(score_ptr + at, s.to(score_ptr.dtype.element_ty), mask=writer)
            state_at, state_mask = state[:, None] * D + j, inside[:, None] & (j < D)
            delta = tl.load(displacement_ptr + state_at, mask=state_mask, other=0.0).to(tl.float32)
            s = tl.reshape(s, (STATES, BLOCK_K, BLOCK_D))
            projection = tl.sum(s * delta[:, None, :], 2)
            squares = tl.sum(projection * projection, 1)
            size = tl.sum(tl.sum(s * s, 2), 1)
            pull = tl.sum(projection[:, :, None] * s, 1)
            penalty, gradient, _ = close_penalty(squares, size, pull, delta, damping, eps, K, D, NORMALIZE)
            tl.store(penalty_ptr + state, penalty, mask=inside & (part == 0))
            tl.store(gradient_ptr + state_at, gradient, mask=state_mask & (part == 0))
