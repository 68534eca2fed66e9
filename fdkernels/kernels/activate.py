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
