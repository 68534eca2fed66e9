"""Rows of any size are copied between memory and padded tiles: each number goes where it belongs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fdkernels.kernels.rows import load_rows, store_rows
from tests.kernels.device import INTERPRETED, guarded

SIZES = [*range(1, 34), 63, 65] if INTERPRETED else [1, 2, 3, 5, 6, 7, 9, 13, 17, 18, 25, 31]


@triton.jit
def copy_kernel(
    source_ptr, target_ptr, num_rows, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy (num_rows, K, D) in the way in which the penalty's kernels read it."""
    RUN: tl.constexpr = ROWS * (K if K < BLOCK_K else BLOCK_K)
    STEP: tl.constexpr = ROWS * K if K <= BLOCK_K else (K | BLOCK_K) & -(K | BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rk = tl.arange(0, ROWS * BLOCK_K)
    row = rk // BLOCK_K * K + rk % BLOCK_K
    for k0 in range(0, K, BLOCK_K):
        keep = rk % BLOCK_K < K - k0
        tile = load_rows(source_ptr, first * K + k0, num_rows * K, row, keep, RUN, STEP, D, BLOCK_D)
        store_rows(target_ptr, tile, first * K + k0, num_rows * K, row, keep, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_samples", "block_k", "rows"), [(1, 1, 1), (1, 1, 2), (1, 1, 8), (3, 4, 1), (5, 2, 1), (7, 8, 2)]
)
def test_every_size(num_samples: int, block_k: int, rows: int, dtype: torch.dtype) -> None:
    """K = 1 covers displacements."""
    for d in SIZES:
        source = guarded(torch.randn(5, num_samples, d).to(dtype))
        target = guarded(torch.full_like(source, torch.nan))
        copy_kernel[(-(-5 // rows),)](
            source, target, 5, K=num_samples, D=d, ROWS=rows, BLOCK_K=block_k, BLOCK_D=triton.next_power_of_2(d)
        )
        assert torch.equal(source, target), f"d={d}"
