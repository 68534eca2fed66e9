"""Layers of a velocity MLP inside a kernel, for a block of rows. Weights are read in the layout of the module.

    h_1     = act(W_x·x + W_t·t + o),    o = W_cond·cond + b_1, once per solve
    h_{l+1} = act(W_l·h_l + b_l)
    v       = W_out·h + b_out

``streamed.py`` and ``stationary.py`` are two ways to bring the weights to the arithmetic; ``turn.py`` leaves the hidden
layers to a library.

NET is the network's ``Architecture``, PLAN the ``FlowPlan``. Tiles are float32, except for the operands of products
after the first layer, which have the dtype of the scratch for hidden activations. The first layer's operands are
float32 so that x and cond are not rounded to half precision. A field of a record is assigned to a name annotated
``tl.constexpr`` before it is passed on to a function; otherwise Triton does not treat it as a constant.
"""

import triton
import triton.language as tl

from fdkernels.kernels.activate import activate


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a product. A TF32 product reads 10 bits of a float32 fraction and drops the rest.

    Dropping them is a bias, six times the error of rounding. The factor adds half a unit of the last bit on average (a
    third to seven tenths of one), at the cost of one multiplication. Numbers that fit into 10 bits are unchanged.
    """
    x = x.to(DTYPE)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = (x * 1.000342).to(tl.int32, bitcast=True) & -0x2000
        return x.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def load_bias(bias_ptr, model, n, WIDTH: tl.constexpr):
    """The bias of outputs n, (1, len(n)) float32; zeros if the layer has none."""
    if bias_ptr is None:
        return tl.zeros((1, n.shape[0]), tl.float32)
    else:
        return tl.load(bias_ptr + model * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def bias_of_rows(bias_ptr, model, r, n, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """The bias of outputs n in each of the rows r; zero in rows that carry a tangent (``tangents.py``)."""
    bias = load_bias(bias_ptr, model, n, WIDTH)
    if LANES == 1:
        return tl.zeros((r.shape[0], n.shape[0]), tl.float32) + bias
    else:
        return tl.where((r % LANES == 0)[:, None], bias, 0.0)


@triton.jit
def load_weight(
    weight_ptr, model, k, n, FAN_IN: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Inputs FIRST + k < LAST and outputs n < WIDTH of a (WIDTH, FAN_IN) matrix, as (len(k), len(n)); zero beyond."""
    at = weight_ptr + model * (WIDTH * FAN_IN) + n[None, :] * FAN_IN + FIRST + k[:, None]
    SIZE: tl.constexpr = LAST - FIRST
    whole: tl.constexpr = SIZE // k.shape[0] * k.shape[0] == SIZE and WIDTH // n.shape[0] * n.shape[0] == WIDTH
    if whole:  # a mask would prevent wide loads
        return tl.load(at)
    else:
        return tl.load(at, mask=(FIRST + k < LAST)[:, None] & (n < WIDTH)[None, :], other=0.0)


@triton.jit
def first_product(rows, weight, total, PRECISION: tl.constexpr):
    """total + rows @ weight, with float32 operands."""
    rows, weight = operand(rows, tl.float32, PRECISION), operand(weight, tl.float32, PRECISION)
    return tl.dot(rows, weight, total, input_precision=PRECISION)


@triton.jit
def condition_share(
    cond_ptr, cond_row, keep, model, weights, share_ptr, first_column, last_column,
    NET: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr = 1,
):  # fmt: skip
    """Write some columns of o = W_cond·cond + b_1, for a block of rows, into (rows, width) at ``share_ptr``.

    Rows to ``keep`` have a condition.
    """
    BLOCK_C: tl.constexpr = 32
    COND: tl.constexpr = NET.cond_dim
    AT: tl.constexpr = NET.at_cond
    FAN_IN: tl.constexpr = NET.cond_dim + NET.action_dim + 1
    WIDTH: tl.constexpr = NET.widths[0]
    r = tl.arange(0, keep.shape[0])
    for n0 in tl.range(first_column, last_column, BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        share = bias_of_rows(weights.biases[0], model, r, n, WIDTH, LANES)
        if cond_ptr is not None:
            for c0 in tl.range(0, COND, BLOCK_C, num_stages=1):
                c = c0 + tl.arange(0, BLOCK_C)
                mask = keep[:, None] & (c < COND)[None, :]
                cond = tl.load(cond_ptr + cond_row[:, None] * COND + c[None, :], mask=mask, other=0.0)
                weight = load_weight(weights.weights[0], model, c, n, FAN_IN, AT, AT + COND, WIDTH)
                share = first_product(cond, weight, share, PRECISION)
        tl.store(share_ptr + r[:, None] * WIDTH + n[None, :], share, mask=(n < WIDTH)[None, :])


@triton.jit
def first_layer(
    x, t, share_row, n, model, weight_ptr, share_ptr, NET: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """W_x·x + W_t·t + o at outputs n, before the activation; o is read from rows ``share_row`` at ``share_ptr``."""
    FAN_IN: tl.constexpr = NET.cond_dim + NET.action_dim + 1
    WIDTH: tl.constexpr = NET.widths[0]
    BEGIN: tl.constexpr = NET.at_x
    END: tl.constexpr = NET.at_x + NET.action_dim
    j = tl.arange(0, x.shape[1])
    share = tl.load(share_ptr + share_row[:, None] * WIDTH + n[None, :], mask=(n < WIDTH)[None, :], other=0.0)
    time_weight = tl.load(weight_ptr + (model * WIDTH + n) * FAN_IN + NET.at_t, mask=n < WIDTH, other=0.0)
    weight = load_weight(weight_ptr, model, j, n, FAN_IN, BEGIN, END, WIDTH)
    return first_product(x, weight, share + t[:, None] * time_weight.to(tl.float32)[None, :], PRECISION)


@triton.jit
def normalise_rows(
    wide_ptr, hidden_ptr, model, scale_ptr, shift_ptr,
    NET: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Apply layer norm and activation, in the order of NET, to (ROWS, width) float32 at ``wide_ptr``.

    The result goes to ``hidden_ptr``.
    """
    WIDTH: tl.constexpr = NET.widths[LAYER]
    NORM: tl.constexpr = NET.norms[LAYER]
    ACTIVATION: tl.constexpr = NET.activations[LAYER]
    BLOCK_WIDTH: tl.constexpr = triton.next_power_of_2(WIDTH)
    # not min and max, which are tl.minimum and tl.maximum before Triton 3.6
    FITTING: tl.constexpr = 4096 // BLOCK_WIDTH if BLOCK_WIDTH < 4096 else 1
    AT_ONCE: tl.constexpr = FITTING if FITTING < ROWS else ROWS
    j = tl.arange(0, BLOCK_WIDTH)
    scale, shift = 1.0 + tl.zeros((1, BLOCK_WIDTH), tl.float32), tl.zeros((1, BLOCK_WIDTH), tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + model * WIDTH + j, mask=j < WIDTH, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + model * WIDTH + j, mask=j < WIDTH, other=0.0).to(tl.float32)[None, :]
    for r0 in tl.range(0, ROWS, AT_ONCE, num_stages=1):
        at = (r0 + tl.arange(0, AT_ONCE))[:, None] * WIDTH + j[None, :]
        inside = tl.broadcast_to((j < WIDTH)[None, :], (AT_ONCE, BLOCK_WIDTH))
        h = tl.load(wide_ptr + at, mask=inside, other=0.0)
        if NORM == "after":
            h = activate(h, ACTIVATION)
        centred = tl.where(inside, h - tl.sum(tl.where(inside, h, 0.0), 1)[:, None] / WIDTH, 0.0)
        variance = tl.sum(centred * centred, 1) / WIDTH
        h = centred * tl.rsqrt(variance + NET.norm_eps[LAYER])[:, None] * scale + shift
        if NORM == "before":
            h = activate(h, ACTIVATION)
        tl.store(hidden_ptr + at, operand(h, hidden_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit
def load_hidden(hidden_ptr, r, k, WIDTH: tl.constexpr):
    at = hidden_ptr + r[:, None] * WIDTH + k[None, :]
    if WIDTH // k.shape[0] * k.shape[0] == WIDTH:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < WIDTH)[None, :], other=0.0)


@triton.jit
def product(
    total, hidden_ptr, r, model, weight_ptr, n, FAN_IN: tl.constexpr, WIDTH: tl.constexpr,
    PLAN: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = True,
):  # fmt: skip
    """total + W·h at outputs n, for rows r at ``hidden_ptr`` (rows, FAN_IN). ROUNDED: ``operand`` was applied to h."""
    for k0 in tl.range(0, FAN_IN, PLAN.block_inputs, num_stages=PLAN.num_stages):
        k = k0 + tl.arange(0, PLAN.block_inputs)
        rows = load_hidden(hidden_ptr, r, k, FAN_IN)
        if not ROUNDED:
            rows = operand(rows, rows.dtype, PRECISION)
        weight = operand(load_weight(weight_ptr, model, k, n, FAN_IN, 0, FAN_IN, WIDTH), rows.dtype, PRECISION)
        total = tl.dot(rows, weight, total, input_precision=PRECISION)
    return total
