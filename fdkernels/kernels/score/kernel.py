"""score = p·v + q·x, the affine map from velocity to score at a known time."""

import triton
import triton.language as tl


@triton.jit
def score_kernel(
    velocity_ptr, x_ptr, pairs_ptr, score_ptr, size, p, q,
    D: tl.constexpr, BLOCK: tl.constexpr, SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """Write p·v + q·x, or p·v if SCORE is "scaled", for a flat block. COEFFICIENTS says where p and q come from."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    # Whole blocks have no mask: a mask that cuts through a vector prevents 128-bit access.
    if first + BLOCK <= size:
        _combine(velocity_ptr, x_ptr, pairs_ptr, score_ptr, e, None, p, q, D, SCORE, COEFFICIENTS)
    else:
        _combine(velocity_ptr, x_ptr, pairs_ptr, score_ptr, e, e < size, p, q, D, SCORE, COEFFICIENTS)


@triton.jit
def _combine(
    velocity_ptr, x_ptr, pairs_ptr, score_ptr, e, mask, p, q,
    D: tl.constexpr, SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    if COEFFICIENTS != "scalar":
        at = e // D if COEFFICIENTS == "rows" else e * 0
        p = tl.load(pairs_ptr + 2 * at, mask=mask).to(tl.float32)
        q = tl.load(pairs_ptr + 2 * at + 1, mask=mask).to(tl.float32)
    score = p * tl.load(velocity_ptr + e, mask=mask).to(tl.float32)
    if SCORE == "velocity":
        score += q * tl.load(x_ptr + e, mask=mask).to(tl.float32)
    tl.store(score_ptr + e, score.to(score_ptr.dtype.element_ty), mask=mask)
