"""What a layer does to a state and its tangents beside the matrix product, which is the same for both.

LANES neighbouring rows of a block belong together, a power of two: the first is a state, and the others are directions
in which it may move. A layer that maps a state from h to f(h) maps a direction g to the derivative of f at h along g.
"""

import triton
import triton.language as tl

from fdkernels.kernels.activate import activate, activate_with_derivative
from fdkernels.kernels.flow.layers import operand


@triton.jit
def activate_lanes(h, LANES: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(h) in the rows of states, act'(state's h)·h in the rows of tangents."""
    if LANES == 1:
        return activate(h, ACTIVATION)
    else:
        STATES: tl.constexpr = h.shape[0] // LANES
        is_state = (tl.arange(0, LANES) == 0)[None, :, None]
        lanes = tl.reshape(h, (STATES, LANES, h.shape[1]))
        state = tl.sum(tl.where(is_state, lanes, 0.0), 1)
        value, slope = activate_with_derivative(state, ACTIVATION)
        lanes = tl.where(is_state, value[:, None, :], slope[:, None, :] * lanes)
        return tl.reshape(lanes, h.shape)


@triton.jit
def normalise_lanes(
    wide_ptr, hidden_ptr, model, scale_ptr, shift_ptr,
    NET: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``normalise_rows`` of states and tangents. Each row reads its state's too, and computes its mean and variance.

    With y = (h − μ)·r·γ + β and ĥ = (h − μ)·r, the derivative along g is γ·r·(g − mean(g) − ĥ·mean(ĥ·g)).
    """
    WIDTH: tl.constexpr = NET.widths[LAYER]
    NORM: tl.constexpr = NET.norms[LAYER]
    ACTIVATION: tl.constexpr = NET.activations[LAYER]
    BLOCK_WIDTH: tl.constexpr = triton.next_power_of_2(WIDTH)
    FITTING: tl.constexpr = 2048 // BLOCK_WIDTH if BLOCK_WIDTH < 2048 else 1
    AT_ONCE: tl.constexpr = FITTING if FITTING < ROWS else ROWS
    j = tl.arange(0, BLOCK_WIDTH)
    scale, shift = 1.0 + tl.zeros((1, BLOCK_WIDTH), tl.float32), tl.zeros((1, BLOCK_WIDTH), tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + model * WIDTH + j, mask=j < WIDTH, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + model * WIDTH + j, mask=j < WIDTH, other=0.0).to(tl.float32)[None, :]
    for r0 in tl.range(0, ROWS, AT_ONCE, num_stages=1):
        r = r0 + tl.arange(0, AT_ONCE)
        is_state = (r % LANES == 0)[:, None]
        inside = tl.broadcast_to((j < WIDTH)[None, :], (AT_ONCE, BLOCK_WIDTH))
        h = tl.load(wide_ptr + (r // LANES * LANES)[:, None] * WIDTH + j[None, :], mask=inside, other=0.0)
        g = tl.load(wide_ptr + r[:, None] * WIDTH + j[None, :], mask=inside, other=0.0)
        if NORM == "after":
            h, slope = activate_with_derivative(h, ACTIVATION)
            g *= slope
        centred = tl.where(inside, h - tl.sum(tl.where(inside, h, 0.0), 1)[:, None] / WIDTH, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + NET.norm_eps[LAYER])[:, None]
        h = centred * inverse
        along = tl.sum(h * g, 1)[:, None] / WIDTH  # h is zero beyond the width
        g = scale * inverse * (g - tl.sum(tl.where(inside, g, 0.0), 1)[:, None] / WIDTH - h * along)
        h = h * scale + shift
        if NORM == "before":
            h, slope = activate_with_derivative(h, ACTIVATION)
            g *= slope
        h = operand(tl.where(is_state, h, g), hidden_ptr.dtype.element_ty, PRECISION)
        tl.store(hidden_ptr + r[:, None] * WIDTH + j[None, :], h, mask=inside)
