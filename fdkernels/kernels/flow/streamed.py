"""Streamed: one program owns the rows and reads every weight at every evaluation. Any widths, any layer norm."""

import triton
import triton.language as tl

from fdkernels.kernels.flow.layers import bias_of_rows, first_layer, normalise_rows, operand, product
from fdkernels.kernels.flow.tangents import activate_lanes, normalise_lanes


@triton.jit
def streamed(
    x, t, share_ptr, hidden_ptr, wide_ptr, model, weights,
    NET: tl.constexpr, PLAN: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr = 1,
):  # fmt: skip
    """v(x, t) for x (rows, padded d) and t (rows,).

    With LANES > 1 only every LANES-th row is a state x. The rows up to the next one are its tangents, for which the
    result is J_v(x, t)·tangent; their t is 0 and their share of the condition too.

    Args:
        hidden_ptr: scratch for two layers' activations, 2·rows·widest in the dtype of the products.
        wide_ptr: scratch for one layer before its layer norm, rows·widest float32.
    """
    DEPTH: tl.constexpr = len(NET.widths)
    ROWS: tl.constexpr = PLAN.rows
    BLOCK_N: tl.constexpr = PLAN.block_n
    BUFFER: tl.constexpr = ROWS * NET.widest
    r = tl.arange(0, ROWS)
    for n0 in tl.range(0, NET.widths[0], BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        h = first_layer(x, t, r, n, model, weights.weights[0], share_ptr, NET, PRECISION)
        finish(h, r, n, hidden_ptr, wide_ptr, NET, 0, PRECISION, LANES)
    settle(hidden_ptr, wide_ptr, model, weights, NET, 0, PLAN, PRECISION, LANES)
    for i in tl.static_range(1, DEPTH):
        source_ptr, target_ptr = hidden_ptr + (i + 1) % 2 * BUFFER, hidden_ptr + i % 2 * BUFFER
        hidden_layer(source_ptr, target_ptr, wide_ptr, r, model, weights, NET, i, PLAN, PRECISION, LANES)
        settle(target_ptr, wide_ptr, model, weights, NET, i, PLAN, PRECISION, LANES)
    D: tl.constexpr = NET.action_dim
    LAST_WIDTH: tl.constexpr = NET.widths[DEPTH - 1]
    j = tl.arange(0, x.shape[1])
    v = bias_of_rows(weights.biases[DEPTH], model, r, j, D, LANES)
    last_ptr = hidden_ptr + (DEPTH + 1) % 2 * BUFFER
    v = product(v, last_ptr, r, model, weights.weights[DEPTH], j, LAST_WIDTH, D, PLAN, PRECISION)
    tl.debug_barrier()  # the next evaluation writes where this one read
    return v


@triton.jit
def hidden_layer(
    source_ptr, target_ptr, wide_ptr, r, model, weights,
    NET: tl.constexpr, LAYER: tl.constexpr, PLAN: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    FAN_IN: tl.constexpr = NET.widths[LAYER - 1]
    WIDTH: tl.constexpr = NET.widths[LAYER]
    BLOCK_N: tl.constexpr = PLAN.block_n
    for n0 in tl.range(0, WIDTH, BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        h = bias_of_rows(weights.biases[LAYER], model, r, n, WIDTH, LANES)
        h = product(h, source_ptr, r, model, weights.weights[LAYER], n, FAN_IN, WIDTH, PLAN, PRECISION)
        finish(h, r, n, target_ptr, wide_ptr, NET, LAYER, PRECISION, LANES)


@triton.jit
def finish(
    h, r, n, hidden_ptr, wide_ptr, NET: tl.constexpr, LAYER: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Store columns n of a layer where the next layer reads them or, before a layer norm, where the norm does."""
    WIDTH: tl.constexpr = NET.widths[LAYER]
    NORM: tl.constexpr = NET.norms[LAYER]
    ACTIVATION: tl.constexpr = NET.activations[LAYER]
    at, mask = r[:, None] * WIDTH + n[None, :], (n < WIDTH)[None, :]
    if NORM == "none":
        DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
        tl.store(hidden_ptr + at, operand(activate_lanes(h, LANES, ACTIVATION), DTYPE, PRECISION), mask=mask)
    else:
        tl.store(wide_ptr + at, h, mask=mask)


@triton.jit
def settle(
    hidden_ptr, wide_ptr, model, weights,
    NET: tl.constexpr, LAYER: tl.constexpr, PLAN: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Wait until all threads see the whole layer, and normalise it if it has a layer norm."""
    NORM: tl.constexpr = NET.norms[LAYER]
    ROWS: tl.constexpr = PLAN.rows
    tl.debug_barrier()
    if NORM != "none":
        if LANES == 1:
            normalise_rows(
                wide_ptr, hidden_ptr, model, weights.scales[LAYER], weights.shifts[LAYER], NET, LAYER, ROWS, PRECISION
            )  # fmt: skip
        else:
            normalise_lanes(
                wide_ptr, hidden_ptr, model, weights.scales[LAYER], weights.shifts[LAYER],
                NET, LAYER, ROWS, PRECISION, LANES,
            )  # fmt: skip
        tl.debug_barrier()
