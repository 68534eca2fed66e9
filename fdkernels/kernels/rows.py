"""Rows of d numbers between memory and padded register tiles, in 128-bit pieces whatever d is.

Triton's tiles have power-of-two sides, rows of d = 6, 7 or 17 do not. Read row by row into a padded tile, such rows
start at any multiple of 4 bytes, so that each thread loads one number at a time. But neighbouring rows are one
contiguous run: it is read flat from its last 16-byte boundary, and shared memory spreads it over the padded tile.
"""

import triton
import triton.language as tl

from fdkernels.kernels.oldest_triton import GATHERS


@triton.jit
def load_rows(
    ptr, first, num_rows, row, keep, RUN: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows ``first + row`` of a contiguous (num_rows, D) matrix as float32 (len(row), BLOCK_D), zero where not kept.

    Args:
        first: int64, a multiple of STEP; ``row`` counts from it, and lies in [0, RUN) where ``keep`` is true.
        keep: which of the rows are wanted; rows at or beyond ``num_rows`` never are.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    j = tl.arange(0, BLOCK_D)
    keep = (keep & (first + row < num_rows))[:, None] & (j < D)[None, :]
    offset = row[:, None] * D + j[None, :]
    if D % VECTOR == 0 or not GATHERS:  # every row starts on a 16-byte boundary
        return tl.load(ptr + first * D + offset, mask=keep, other=0.0).to(tl.float32)
    else:
        start = first * D
        aligned = start // VECTOR * VECTOR
        # A start that is known to be aligned (STEP rows are a whole number of vectors) needs no room for the shift.
        SHIFT: tl.constexpr = 0 if (STEP * D) % VECTOR == 0 else VECTOR - 1
        SPAN: tl.constexpr = (RUN * D + SHIFT + VECTOR - 1) // VECTOR * VECTOR
        e = tl.arange(0, triton.next_power_of_2(SPAN))
        # Only the run that ends the tensor is masked by element: a mask that cuts through a vector forbids wide loads.
        if aligned + SPAN <= num_rows * D:
            flat = tl.load(ptr + aligned + e, mask=e < SPAN, other=0.0)
        else:
            flat = tl.load(ptr + aligned + e, mask=e < num_rows * D - aligned, other=0.0)
        if row.shape[0] == RUN and BLOCK_D == D and SHIFT == 0:  # nothing to pad, and nothing to move
            tile = tl.reshape(flat, keep.shape)
        else:
            index = tl.where(keep, offset + (start - aligned).to(tl.int32), 0)
            tile = tl.reshape(tl.gather(flat, tl.ravel(index), 0), keep.shape)
        return tl.where(keep, tile, 0.0).to(tl.float32)  # what the run holds beside the wanted rows may be NaN


@triton.jit
def store_rows(ptr, tile, first, num_rows, row, keep, D: tl.constexpr):
    """The inverse of ``load_rows``, without the flat run: neighbours of the run belong to other programs."""
    j = tl.arange(0, tile.shape[1])
    keep = (keep & (first + row < num_rows))[:, None] & (j < D)[None, :]
    tl.store(ptr + first * D + row[:, None] * D + j[None, :], tile.to(ptr.dtype.element_ty), mask=keep)
