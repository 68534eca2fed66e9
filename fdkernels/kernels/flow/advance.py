"""Draw noise, and apply one line of a solver's table, for the rows of a program."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """x clamped to [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def normal(seed, position):
    """N(0, 1) by Philox-4x32-10 and Box-Muller at 64-bit positions, as in ``fdkernels.philox.philox_normal``."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, high * 0, high * 0)
    number, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second))
    return number


@triton.jit
def noise(given_ptr, seed_ptr, at, first, mask):
    """Elements ``at`` of the given noise; without it, numbers drawn at positions ``first + at``."""
    if given_ptr is None:
        return tl.where(mask, normal(tl.load(seed_ptr), first + at), 0.0)
    else:
        return tl.load(given_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def advance(x, total, v, line_ptr, last, low, high, CLIP: tl.constexpr):
    """The state, the sum within the step, and the point of the next evaluation, after an evaluation that gave v.

    Args:
        line_ptr: time, reach, weight, and 1 if the step ends.
        last: whether this is the table's last line.
        CLIP: "end", "step" or "never".
    """
    total += tl.load(line_ptr + 2) * v
    z = x + tl.load(line_ptr + 1) * v
    if tl.load(line_ptr + 3) > 0:
        x += total
        total = tl.zeros_like(total)
        if CLIP == "step":
            x = clamp(x, low, high)
        elif CLIP == "end":
            if last:
                x = clamp(x, low, high)
        z = x
    return x, total, z
