"""Stationary: SPLIT programs own the same rows, and each keeps its columns of every hidden layer on the chip.

The weights are read once for the whole solve. Activations are exchanged through the L2 cache, with a barrier among the
programs after each layer. All hidden layers have one width, a power of two, and no layer norm.
"""

import triton
import triton.language as tl

from fdkernels.kernels.activate import activate
from fdkernels.kernels.flow.layers import first_layer, load_bias, load_weight, operand


@triton.jit
def load_slices(
    weights, model, part, NET: tl.constexpr, PLAN: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """This program's columns of the hidden layers after the first, as a tuple of (inputs, columns) tiles."""
    WIDTH: tl.constexpr = NET.widest
    CHUNK: tl.constexpr = PLAN.block_inputs
    COLUMNS: tl.constexpr = WIDTH // PLAN.split
    n = part * COLUMNS + tl.arange(0, COLUMNS)
    slices = ()
    for i in tl.static_range(1, len(NET.widths)):
        for c in tl.static_range(WIDTH // CHUNK):
            k = c * CHUNK + tl.arange(0, CHUNK)
            weight = load_weight(weights.weights[i], model, k, n, WIDTH, 0, WIDTH, WIDTH)
            slices = slices + (operand(weight, HIDDEN, PRECISION),)
    return slices


@triton.jit
def meet(counter_ptr, arrivals):
    """Wait for all programs of a group. What they wrote before is visible after.

    ``arrivals`` is the number of arrivals to wait for, counted since the counter was zero. A cooperative launch keeps
    the whole group on the chip at once.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def stationary(
    x, t, share_ptr, hidden_ptr, partial_ptr, counter_ptr, meetings, part, slices, model, weights,
    NET: tl.constexpr, PLAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v(x, t), bitwise equal in every program of the group, and the number of meetings so far.

    Args:
        hidden_ptr: the group's scratch for two layers' activations, 2·rows·width in the dtype of the products.
        partial_ptr: the group's scratch for shares of v, split·rows·padded d float32.
        meetings: barriers passed since the counter was zero.
    """
    HIDDEN: tl.constexpr = hidden_ptr.dtype.element_ty
    DEPTH: tl.constexpr = len(NET.widths)
    WIDTH: tl.constexpr = NET.widest
    ROWS: tl.constexpr = PLAN.rows
    SPLIT: tl.constexpr = PLAN.split
    CHUNK: tl.constexpr = PLAN.block_inputs
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    COLUMNS: tl.constexpr = WIDTH // SPLIT
    r = tl.arange(0, ROWS)
    n = part * COLUMNS + tl.arange(0, COLUMNS)
    h = first_layer(x, t, r, n, model, weights.weights[0], share_ptr, NET, PRECISION)
    for i in tl.static_range(1, DEPTH):
        # Two buffers are enough: before a program writes one again, it has met all programs that read it.
        layer_ptr = hidden_ptr + i % 2 * (ROWS * WIDTH)
        h = operand(activate(h, tl.constexpr(NET.activations[i - 1])), HIDDEN, PRECISION)
        tl.store(layer_ptr + r[:, None] * WIDTH + n[None, :], h)
        meetings += 1
        meet(counter_ptr, meetings * SPLIT)
        h = tl.zeros((ROWS, COLUMNS), tl.float32) + load_bias(weights.biases[i], model, n, WIDTH)
        for c in tl.static_range(CHUNKS):
            k = c * CHUNK + tl.arange(0, CHUNK)
            rows = tl.load(layer_ptr + r[:, None] * WIDTH + k[None, :], cache_modifier=".cg")
            h = tl.dot(rows, slices[(i - 1) * CHUNKS + c], h, input_precision=PRECISION)

    # Each program multiplies its own inputs of the last layer; all programs sum the shares in the same order.
    D: tl.constexpr = NET.action_dim
    j = tl.arange(0, x.shape[1])
    h = operand(activate(h, tl.constexpr(NET.activations[DEPTH - 1])), HIDDEN, PRECISION)
    weight = operand(load_weight(weights.weights[DEPTH], model, n, j, WIDTH, 0, WIDTH, D), HIDDEN, PRECISION)
    own = tl.dot(h, weight, input_precision=PRECISION)
    at = r[:, None] * x.shape[1] + j[None, :]
    tl.store(partial_ptr + part * (ROWS * x.shape[1]) + at, own)
    meetings += 1
    meet(counter_ptr, meetings * SPLIT)
    v = tl.zeros(x.shape, tl.float32) + load_bias(weights.biases[DEPTH], model, j, D)
    for other in tl.static_range(SPLIT):
        v += tl.load(partial_ptr + other * (ROWS * x.shape[1]) + at, cache_modifier=".cg")
    return v, meetings
