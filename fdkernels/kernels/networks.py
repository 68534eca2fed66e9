"""A velocity MLP evaluated for a block of rows inside a kernel, its weights read as the module holds them.

    h_1     = act(W_x·x + W_t·t + o),    o = W_cond·cond + b_1, once per solve
    h_{l+1} = act(W_l·h_l + b_l)
    v       = W_out·h + b_out

Two ways to get the weights to the arithmetic:

``streamed``    one program owns the rows and reads every weight at every evaluation. Any widths, any layer norm.
``stationary``  SPLIT programs own the same rows. Each keeps its columns of every hidden layer on the chip for the whole
                solve; activations are exchanged through the L2 cache, with a barrier among the programs after each
                layer. The weights are read once. Hidden widths are equal powers of two, without layer norm.

Tiles are float32 but for the operands of the other layers' products, which have the dtype of the scratch for hidden
activations. The first layer's operands are float32, so that x and cond are not rounded to half precision.

What comes out of a tuple is wrapped in ``tl.constexpr`` before it goes to another function: Triton 3.6 does not do so.
"""

import triton
import triton.language as tl


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == "gelu_tanh":  # (h/2)(1 + tanh u) = h·sigmoid(2u): one exponential less
        return h * tl.sigmoid(h * (1.5957691216057308 + 0.07135481627159625 * h * h))
    elif ACTIVATION == "gelu":
        return 0.5 * h * (1 + tl.erf(0.7071067811865476 * h))
    elif ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    elif ACTIVATION == "relu":
        return tl.where(h < 0, 0.0, h)
    elif ACTIVATION == "tanh":
        return 2 * tl.sigmoid(2 * h) - 1
    else:
        tl.static_assert(ACTIVATION == "none", "no kernel knows this activation")
        return h


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as a product takes it. Of float32 a TF32 product reads 10 bits after the point, and leaves off the others.

    That is a bias, six times the error of rounding. The factor adds half a unit of the last bit on average (a third to
    seven tenths of one), at the cost of one multiplication; what has no more bits than are read stays what it is.
    """
    x = x.to(DTYPE)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = (x * 1.000342).to(tl.int32, bitcast=True) & -0x2000
        return x.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def load_bias(bias_ptr, model, n, WIDTH: tl.constexpr):
    """(1, len(n)) float32; zeros where the layer has none."""
    if bias_ptr is None:
        return tl.zeros((1, n.shape[0]), tl.float32)
    else:
        return tl.load(bias_ptr + model * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_weight(
    weight_ptr, model, k, n, FAN_IN: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Inputs FIRST + k < LAST of outputs n < WIDTH, from a (WIDTH, FAN_IN) matrix: (len(k), len(n)), zero beyond."""
    at = weight_ptr + model * (WIDTH * FAN_IN) + n[None, :] * FAN_IN + FIRST + k[:, None]
    SIZE: tl.constexpr = LAST - FIRST
    whole: tl.constexpr = SIZE // k.shape[0] * k.shape[0] == SIZE and WIDTH // n.shape[0] * n.shape[0] == WIDTH
    if whole:  # a mask would forbid wide loads
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
    cond_ptr, cond_row, keep, model, weight_ptr, bias_ptr, share_ptr, first_column, last_column,
    COND: tl.constexpr, AT_COND: tl.constexpr, FAN_IN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = W_cond·cond + b_1 of a block of rows, some columns of it, into (rows, WIDTH) at ``share_ptr``."""
    BLOCK_C: tl.constexpr = 32
    r = tl.arange(0, keep.shape[0])
    for n0 in tl.range(first_column, last_column, BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        share = tl.zeros((keep.shape[0], BLOCK_N), tl.float32) + load_bias(bias_ptr, model, n, WIDTH)
        if cond_ptr is not None:
            for c0 in tl.range(0, COND, BLOCK_C, num_stages=1):
                c = c0 + tl.arange(0, BLOCK_C)
                mask = keep[:, None] & (c < COND)[None, :]
                cond = tl.load(cond_ptr + cond_row[:, None] * COND + c[None, :], mask=mask, other=0.0)
                weight = load_weight(weight_ptr, model, c, n, FAN_IN, AT_COND, AT_COND + COND, WIDTH)
                share = first_product(cond, weight, share, PRECISION)
        tl.store(share_ptr + r[:, None] * WIDTH + n[None, :], share, mask=(n < WIDTH)[None, :])


@triton.jit
def first_layer(
    x, t, share_row, n, model, weight_ptr, share_ptr,
    D: tl.constexpr, AT_X: tl.constexpr, AT_T: tl.constexpr, FAN_IN: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W_x·x + W_t·t + o at the outputs n, before the activation; o of each row is in a row of ``share_ptr``."""
    j = tl.arange(0, x.shape[1])
    share = tl.load(share_ptr + share_row[:, None] * WIDTH + n[None, :], mask=(n < WIDTH)[None, :], other=0.0)
    time_weight = tl.load(weight_ptr + (model * WIDTH + n) * FAN_IN + AT_T, mask=n < WIDTH, other=0.0).to(tl.float32)
    weight = load_weight(weight_ptr, model, j, n, FAN_IN, AT_X, AT_X + D, WIDTH)
    return first_product(x, weight, share + t[:, None] * time_weight[None, :], PRECISION)


@triton.jit
def normalise_rows(
    wide_ptr, hidden_ptr, model, scale_ptr, shift_ptr, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Layer norm "before" or "after" the activation of (ROWS, WIDTH) float32 at ``wide_ptr``, into ``hidden_ptr``."""
    # not min and max, which Triton before 3.6 takes for tensors'
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
        h = centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)[:, None] * scale + shift
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
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = True,
):  # fmt: skip
    """total + W·h for the rows r of ``hidden_ptr`` (rows, FAN_IN), which may be ROUNDED already, and the outputs n."""
    for k0 in tl.range(0, FAN_IN, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = load_hidden(hidden_ptr, r, k, FAN_IN)
        if not ROUNDED:
            rows = operand(rows, rows.dtype, PRECISION)
        weight = operand(load_weight(weight_ptr, model, k, n, FAN_IN, 0, FAN_IN, WIDTH), rows.dtype, PRECISION)
        total = tl.dot(rows, weight, total, input_precision=PRECISION)
    return total


@triton.jit
def finish(
    h, r, n, hidden_ptr, wide_ptr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns n of a layer to where the next one reads them, or, before a layer norm, to where that does."""
    at, mask = r[:, None] * WIDTH + n[None, :], (n < WIDTH)[None, :]
    if NORM == "none":
        tl.store(hidden_ptr + at, operand(activate(h, ACTIVATION), hidden_ptr.dtype.element_ty, PRECISION), mask=mask)
    else:
        tl.store(wide_ptr + at, h, mask=mask)


@triton.jit
def settle(
    hidden_ptr, wide_ptr, model, scale_ptr, shift_ptr, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A layer is whole, and seen by all threads."""
    tl.debug_barrier()
    if NORM != "none":
        normalise_rows(
            wide_ptr, hidden_ptr, model, scale_ptr, shift_ptr, eps,
            ROWS, WIDTH, triton.next_power_of_2(WIDTH), ACTIVATION, NORM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def hidden_layer(
    source_ptr, target_ptr, wide_ptr, model, weight_ptr, bias_ptr, r,
    FAN_IN: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for n0 in tl.range(0, WIDTH, BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        h = tl.zeros((r.shape[0], BLOCK_N), tl.float32) + load_bias(bias_ptr, model, n, WIDTH)
        h = product(h, source_ptr, r, model, weight_ptr, n, FAN_IN, WIDTH, BLOCK_K, STAGES, PRECISION)
        finish(h, r, n, target_ptr, wide_ptr, WIDTH, ACTIVATION, NORM, PRECISION)


@triton.jit
def streamed(
    x, t, share_ptr, hidden_ptr, wide_ptr, model, weights, biases, scales, shifts, norm_eps,
    D: tl.constexpr, AT_X: tl.constexpr, AT_T: tl.constexpr, FAN_IN: tl.constexpr, WIDTHS: tl.constexpr,
    WIDEST: tl.constexpr, ACTIVATIONS: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """v(x, t) of x (ROWS, padded d) and t (ROWS,).

    Args:
        hidden_ptr: scratch for two layers' activations, 2·ROWS·WIDEST in the dtype of the products.
        wide_ptr: scratch for one layer before its layer norm, ROWS·WIDEST float32.
    """
    DEPTH: tl.constexpr = len(WIDTHS)
    BUFFER: tl.constexpr = ROWS * WIDEST
    r = tl.arange(0, ROWS)
    for n0 in tl.range(0, WIDTHS[0], BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        h = first_layer(x, t, r, n, model, weights[0], share_ptr, D, AT_X, AT_T, FAN_IN, WIDTHS[0], PRECISION)
        finish(
            h, r, n, hidden_ptr, wide_ptr, WIDTHS[0], tl.constexpr(ACTIVATIONS[0]), tl.constexpr(NORMS[0]), PRECISION
        )  # fmt: skip
    settle(
        hidden_ptr, wide_ptr, model, scales[0], shifts[0], norm_eps[0],
        ROWS, WIDTHS[0], tl.constexpr(ACTIVATIONS[0]), tl.constexpr(NORMS[0]), PRECISION,
    )  # fmt: skip
    for i in tl.static_range(1, DEPTH):
        source_ptr, target_ptr = hidden_ptr + (i + 1) % 2 * BUFFER, hidden_ptr + i % 2 * BUFFER
        hidden_layer(
            source_ptr, target_ptr, wide_ptr, model, weights[i], biases[i], r, WIDTHS[i - 1], WIDTHS[i],
            tl.constexpr(ACTIVATIONS[i]), tl.constexpr(NORMS[i]), PRECISION, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        settle(
            target_ptr, wide_ptr, model, scales[i], shifts[i], norm_eps[i],
            ROWS, WIDTHS[i], tl.constexpr(ACTIVATIONS[i]), tl.constexpr(NORMS[i]), PRECISION,
        )  # fmt: skip
    j = tl.arange(0, x.shape[1])
    v = product(
        tl.zeros(x.shape, tl.float32) + load_bias(biases[DEPTH], model, j, D), hidden_ptr + (DEPTH + 1) % 2 * BUFFER,
        r, model, weights[DEPTH], j, WIDTHS[DEPTH - 1], D, BLOCK_K, STAGES, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # the next evaluation writes where this one read
    return v


@triton.jit
def load_slices(
    weights, model, part, DEPTH: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program's columns of the hidden layers 2 ... DEPTH, as a tuple of (CHUNK, WIDTH / SPLIT) tiles."""
    n = part * (WIDTH // SPLIT) + tl.arange(0, WIDTH // SPLIT)
    slices = ()
    for i in tl.static_range(1, DEPTH):
        for c in tl.static_range(WIDTH // CHUNK):
            k = c * CHUNK + tl.arange(0, CHUNK)
            weight = load_weight(weights[i], model, k, n, WIDTH, 0, WIDTH, WIDTH)
            slices = slices + (operand(weight, HIDDEN, PRECISION),)
    return slices


@triton.jit
def meet(counter_ptr, arrivals):
    """All programs of a group reach this line before any leaves it; what they wrote before is seen after.

    ``arrivals`` counts all that must have come since the counter was zero. The group is on the chip all at once.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def stationary(
    x, t, share_ptr, hidden_ptr, partial_ptr, counter_ptr, meetings, part, slices, model, weights, biases,
    D: tl.constexpr, AT_X: tl.constexpr, AT_T: tl.constexpr, FAN_IN: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, ACTIVATIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """v(x, t), the same bits in every program of the group, and the number of meetings so far.

    Args:
        hidden_ptr: the group's scratch for two layers' activations, 2·ROWS·WIDTH in the dtype of the products.
        partial_ptr: the group's scratch for shares of v, SPLIT·ROWS·padded d float32.
        meetings: barriers passed since the counter was zero.
    """
    HIDDEN: tl.constexpr = hidden_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    COLUMNS: tl.constexpr = WIDTH // SPLIT
    r = tl.arange(0, ROWS)
    n = part * COLUMNS + tl.arange(0, COLUMNS)
    h = first_layer(x, t, r, n, model, weights[0], share_ptr, D, AT_X, AT_T, FAN_IN, WIDTH, PRECISION)
    for i in tl.static_range(1, DEPTH):
        # Two buffers are enough: who writes one again has met everybody who was reading it.
        layer_ptr = hidden_ptr + i % 2 * (ROWS * WIDTH)
        h = operand(activate(h, tl.constexpr(ACTIVATIONS[i - 1])), HIDDEN, PRECISION)
        tl.store(layer_ptr + r[:, None] * WIDTH + n[None, :], h)
        meetings += 1
        meet(counter_ptr, meetings * SPLIT)
        h = tl.zeros((ROWS, COLUMNS), tl.float32) + load_bias(biases[i], model, n, WIDTH)
        for c in tl.static_range(CHUNKS):
            k = c * CHUNK + tl.arange(0, CHUNK)
            rows = tl.load(layer_ptr + r[:, None] * WIDTH + k[None, :], cache_modifier=".cg")
            h = tl.dot(rows, slices[(i - 1) * CHUNKS + c], h, input_precision=PRECISION)

    # Each program multiplies its own columns of the last layer; the sum over programs has one order for all.
    j = tl.arange(0, x.shape[1])
    h = operand(activate(h, tl.constexpr(ACTIVATIONS[DEPTH - 1])), HIDDEN, PRECISION)
    weight = operand(load_weight(weights[DEPTH], model, n, j, WIDTH, 0, WIDTH, D), HIDDEN, PRECISION)
    own = tl.dot(h, weight, input_precision=PRECISION)
    at = r[:, None] * x.shape[1] + j[None, :]
    tl.store(partial_ptr + part * (ROWS * x.shape[1]) + at, own)
    meetings += 1
    meet(counter_ptr, meetings * SPLIT)
    v = tl.zeros(x.shape, tl.float32) + load_bias(biases[DEPTH], model, j, D)
    for other in tl.static_range(SPLIT):
        v += tl.load(partial_ptr + other * (ROWS * x.shape[1]) + at, cache_modifier=".cg")
    return v, meetings
