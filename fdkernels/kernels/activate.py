"""Activations inside a kernel: one branch for each row of ``fdkernels/activations.py``."""

import triton
import triton.language as tl


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation of h; NaN stays NaN."""
    if ACTIVATION == "gelu_tanh":  # (h/2)(1 + tanh u) = h·sigmoid(2u), which saves an exponential
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
def activate_with_derivative(h, ACTIVATION: tl.constexpr):
    """The activation of h and its derivative there, which share their exponential; NaN stays NaN."""
    if ACTIVATION == "gelu_tanh":
        square = tl.minimum(h * h, 100.0)  # beyond, the slope is zero, and an infinite square would give NaN
        value, slope = sigmoid(h * (1.5957691216057308 + 0.07135481627159625 * square))
        return h * value, value + h * slope * (1.5957691216057308 + 0.21406444881478875 * square)
    elif ACTIVATION == "gelu":
        value = 0.5 + 0.5 * tl.erf(0.7071067811865476 * h)
        return h * value, value + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    elif ACTIVATION == "silu":
        value, slope = sigmoid(h)
        return h * value, value + h * slope
    elif ACTIVATION == "relu":
        return tl.where(h < 0, 0.0, h), tl.where(h > 0, 1.0, tl.where(h <= 0, 0.0, h))
    elif ACTIVATION == "tanh":
        value, slope = sigmoid(2 * h)
        return 2 * value - 1, 4 * slope
    else:
        tl.static_assert(ACTIVATION == "none", "no kernel knows this activation's derivative")
        return h, tl.zeros_like(h) + 1.0


@triton.jit
def sigmoid(h):
    """sigmoid(h) and its derivative sigmoid(h)·sigmoid(−h), without the cancellation of 1 − sigmoid(h)."""
    small = tl.exp(-tl.abs(h))
    large = 1 / (1 + small)
    return tl.where(h < 0, small * large, large), small * large * large
