"""score = p·v + q·x, the affine map from velocity to score once the time is known."""

import triton
import triton.language as tl


@triton.jit
def score_kernel(
    velocity_ptr, x_ptr, coefficient_ptr, score_ptr, size, p, q,
    D: tl.constexpr, BLOCK: tl.constexpr, SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """p·v + q·x over a flat run; p·v alone where SCORE is "scaled". p and q come from a tensor if there is one."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    # Whole blocks carry no mask: one that cuts through a vector would forbid 128-bit access.
    if first + BLOCK <= size:
        _combine(velocity_ptr, x_ptr, coefficient_ptr, score_ptr, e, None, p, q, D, SCORE, COEFFICIENTS)
    else:
        _combine(velocity_ptr, x_ptr, coefficient_ptr, score_ptr, e, e < size, p, q, D, SCORE, COEFFICIENTS)


@triton.jit
def _combine(
    velocity_ptr, x_ptr, coefficient_ptr, score_ptr, e, mask, p, q,
    D: tl.constexpr, SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    if COEFFICIENTS != "scalar":
        at = e // D if COEFFICIENTS == "rows" else e * 0
        p = tl.load(coefficient_ptr + 2 * at, mask=mask).to(tl.float32)
        q = tl.load(coefficient_ptr + 2 * at + 1, mask=mask).to(tl.float32)
    score = p * tl.load(velocity_ptr + e, mask=mask).to(tl.float32)
    if SCORE == "velocity":
        score += q * tl.load(x_ptr + e, mask=mask).to(tl.float32)
    tl.store(score_ptr + e, score.to(score_ptr.dtype.element_ty), mask=mask)
