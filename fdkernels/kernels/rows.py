"""Move rows of d numbers between memory and padded register tiles, with 128-bit loads for every d.

The sides of a Triton tile are powers of two; d = 6, 7 or 17 is not. If such rows are read one by one into a padded
tile, each may start at any multiple of 4 bytes, and every thread loads one number at a time. But neighbouring rows form
one contiguous run. It is read flat, from the 16-byte boundary before it, and spread over the padded tile through
shared memory.
"""

import triton
import triton.language as tl

from fdkernels.kernels.oldest_triton import GATHERS


@triton.jit
def load_rows(
    ptr, first, num_rows, row, keep, RUN: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows ``first + row`` of a contiguous (num_rows, D) matrix as float32 (len(row), BLOCK_D); zero where not kept.

    Args:
        first: int64, a multiple of STEP. ``row`` counts from it and lies in [0, RUN) where ``keep`` is true.
        keep: the rows that are wanted. Rows at or beyond ``num_rows`` are zero in any case.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    j = tl.arange(0, BLOCK_D)
    keep = (keep & (first + row < num_rows))[:, None] & (j < D)[None, :]
    offset = row[:, None] * D + j[None, :]
    if D % VECTOR == 0 or not GATHERS:  # rows start on 16-byte boundaries, or Triton is too old
        return tl.load(ptr + first * D + offset, mask=keep, other=0.0).to(tl.float32)
    else:
        start = first * D
        aligned = start // VECTOR * VECTOR
        # If STEP rows are a whole number of vectors, every start is aligned and needs no room for a shift.
        SHIFT: tl.constexpr = 0 if (STEP * D) % VECTOR == 0 else VECTOR - 1
        SPAN: tl.constexpr = (RUN * D + SHIFT + VECTOR - 1) // VECTOR * VECTOR
        e = tl.arange(0, triton.next_power_of_2(SPAN))
        # Only the last run of the tensor is masked by element: a mask that cuts through a vector prevents wide loads.
        if aligned + SPAN <= num_rows * D:
            flat = tl.load(ptr + aligned + e, mask=e < SPAN, other=0.0)
        else:
            flat = tl.load(ptr + aligned + e, mask=e < num_rows * D - aligned, other=0.0)
        if row.shape[0] == RUN and BLOCK_D == D and SHIFT == 0:  # no padding and no shift
            tile = tl.reshape(flat, keep.shape)
        else:
            index = tl.where(keep, offset + (start - aligned).to(tl.int32), 0)
            tile = tl.reshape(tl.gather(flat, tl.ravel(index), 0), keep.shape)
        return tl.where(keep, tile, 0.0).to(tl.float32)  # other numbers of the run may be NaN


@triton.jit
def store_rows(ptr, tile, first, num_rows, row, keep, D: tl.constexpr):
    """The inverse of ``load_rows``, but row by row: a flat run would overwrite rows of other programs."""
    j = tl.arange(0, tile.shape[1])
    keep = (keep & (first + row < num_rows))[:, None] & (j < D)[None, :]
    tl.store(ptr + first * D + row[:, None] * D + j[None, :], tile.to(ptr.dtype.element_ty), mask=keep)
