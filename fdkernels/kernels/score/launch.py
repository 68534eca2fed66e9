"""Launch the score's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels.kernels.score.kernel import score_kernel
from fdkernels.kernels.tuning.table import gpu_of
from fdkernels.kernels.tuning.tiles import score_block
from fdkernels.records import Affine


def score(velocity: Tensor, x: Tensor, affine: Affine) -> Tensor:
    """p·v + q·x, or p·v, (..., d) in the promoted dtype of v and x."""
    out = torch.empty(velocity.shape, dtype=torch.promote_types(velocity.dtype, x.dtype), device=velocity.device)
    if out.numel() == 0:
        return out
    pairs, layout = affine.of_rows(velocity.shape[:-1])
    block, num_warps = score_block(gpu_of(velocity.device), velocity.element_size())
    with torch.cuda.device_of(velocity):
        score_kernel[(-(-out.numel() // block),)](
            velocity.contiguous(),
            x.contiguous() if affine.use_x else out,
            out if pairs is None else pairs,
            out,
            out.numel(),
            affine.p,
            affine.q,
            D=velocity.shape[-1] if layout == "rows" else 1,  # otherwise one kernel serves every d
            BLOCK=block,
            SCORE="velocity" if affine.use_x else "scaled",
            COEFFICIENTS=layout,
            num_warps=num_warps,
        )
    return out
