"""From tensors to launches: contiguous inputs, fresh outputs, a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels.kernels.configs import penalty_tile, score_block
from fdkernels.kernels.penalty import penalty_kernel, score_gradient_kernel
from fdkernels.kernels.score import score_kernel
from fdkernels.kernels.table import gpu_of


def penalty(
    displacement: Tensor,
    score: Tensor,
    damping: float,
    normalize: bool,
    eps: float,
    want_gradient: bool,
    want_trace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty (...), its gradient to the displacement (..., d) and the trace (...), float32; empty if not wanted."""
    return _penalty(
        displacement, score, score, None, 1.0, 0.0, "given", damping, normalize, eps, want_gradient, want_trace
    )


def velocity_penalty(
    displacement: Tensor,
    velocity: Tensor,
    x: Tensor,
    coefficients: Tensor | None,
    p: float,
    q: float,
    use_x: bool,
    damping: float,
    normalize: bool,
    eps: float,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The same for s = p·v + q·x, or p·v; without the trace."""
    kind = "velocity" if use_x else "scaled"
    return _penalty(displacement, velocity, x, coefficients, p, q, kind, damping, normalize, eps, want_gradient, False)[
        :2
    ]


def _penalty(
    displacement: Tensor,
    score: Tensor,
    x: Tensor,
    coefficients: Tensor | None,
    p: float,
    q: float,
    kind: str,
    damping: float,
    normalize: bool,
    eps: float,
    want_gradient: bool,
    want_trace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    *lead, num_samples, d = score.shape
    want_trace = want_trace and normalize
    out = displacement.new_empty(lead, dtype=torch.float32)
    gradient = displacement.new_empty((*lead, d) if want_gradient else 0, dtype=torch.float32)
    trace = displacement.new_empty(lead if want_trace else 0, dtype=torch.float32)
    if out.numel() == 0:
        return out, gradient, trace
    coefficients, layout = _row_coefficients(coefficients, (*lead, num_samples))
    tile = penalty_tile(gpu_of(score.device), "penalty", num_samples, d, score.element_size())
    with torch.cuda.device_of(score):
        penalty_kernel[(-(-out.numel() // tile.rows),)](
            displacement.contiguous(),
            score.contiguous(),
            x.contiguous() if kind == "velocity" else out,  # what a kernel does not read may be any tensor
            out if coefficients is None else coefficients,
            out,
            gradient,
            trace,
            out.numel(),
            p,
            q,
            damping,
            eps,
            K=num_samples,
            D=d,
            ROWS=tile.rows,
            BLOCK_K=tile.block_k,
            BLOCK_D=tile.block_d,
            NORMALIZE=normalize,
            SCORE=kind,
            COEFFICIENTS=layout,
            GRADIENT=want_gradient,
            TRACE=want_trace,
            num_warps=tile.num_warps,
        )
    return out, gradient, trace


def penalty_score_gradient(
    upstream: Tensor, displacement: Tensor, score: Tensor, penalty: Tensor, trace: Tensor, normalize: bool, eps: float
) -> Tensor:
    """upstream · ∂penalty/∂score, in the dtype of the score."""
    num_samples, d = score.shape[-2:]
    out = torch.empty(score.shape, dtype=score.dtype, device=score.device)
    if out.numel() == 0:
        return out
    tile = penalty_tile(gpu_of(score.device), "penalty_score_gradient", num_samples, d, score.element_size())
    with torch.cuda.device_of(score):
        score_gradient_kernel[(-(-penalty.numel() // tile.rows),)](
            upstream.contiguous(),
            displacement.contiguous(),
            score.contiguous(),
            penalty,
            trace,
            out,
            penalty.numel(),
            eps,
            K=num_samples,
            D=d,
            ROWS=tile.rows,
            BLOCK_K=tile.block_k,
            BLOCK_D=tile.block_d,
            NORMALIZE=normalize,
            num_warps=tile.num_warps,
        )
    return out


def score(velocity: Tensor, x: Tensor, coefficients: Tensor | None, p: float, q: float, use_x: bool) -> Tensor:
    """p·v + q·x, or p·v, in the promoted dtype of v and x; coefficients (..., 2) take the place of both."""
    out = torch.empty(velocity.shape, dtype=torch.promote_types(velocity.dtype, x.dtype), device=velocity.device)
    if out.numel() == 0:
        return out
    coefficients, layout = _row_coefficients(coefficients, velocity.shape[:-1])
    block, num_warps = score_block(gpu_of(velocity.device), velocity.element_size())
    with torch.cuda.device_of(velocity):
        score_kernel[(-(-out.numel() // block),)](
            velocity.contiguous(),
            x.contiguous() if use_x else out,
            out if coefficients is None else coefficients,
            out,
            out.numel(),
            p,
            q,
            D=velocity.shape[-1] if layout == "rows" else 1,  # otherwise one kernel serves every d
            BLOCK=block,
            SCORE="velocity" if use_x else "scaled",
            COEFFICIENTS=layout,
            num_warps=num_warps,
        )
    return out


def _row_coefficients(coefficients: Tensor | None, rows: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """(p, q) of every row as a contiguous tensor, and how a kernel finds a row's pair in it."""
    if coefficients is None:
        return None, "scalar"
    if coefficients.numel() == 2:
        return coefficients.contiguous(), "one"
    return coefficients.expand(*rows, 2).contiguous(), "rows"
