"""From tensors to launches of the penalty's kernels: contiguous inputs, fresh outputs, a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.kernels.penalty.kernel import penalty_kernel, score_gradient_kernel
from fdkernels.kernels.tuning.table import gpu_of
from fdkernels.kernels.tuning.tiles import penalty_tile
from fdkernels.records import Affine, PenaltyRule


class _Scores(NamedTuple):
    """Scores as they are given, or velocities that become scores inside the kernel."""

    values: Tensor
    x: Tensor | None
    affine: Affine | None

    @property
    def kind(self) -> str:
        if self.affine is None:
            return "given"
        return "velocity" if self.affine.use_x else "scaled"


def penalty(
    displacement: Tensor, score: Tensor, rule: PenaltyRule, want_gradient: bool, want_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty (...), its gradient to the displacement (..., d) and the trace (...), float32; empty if not wanted."""
    return _penalty(displacement, _Scores(score, None, None), rule, want_gradient, want_trace)


def velocity_penalty(
    displacement: Tensor, velocity: Tensor, x: Tensor, affine: Affine, rule: PenaltyRule, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same for s = p·v + q·x, or p·v; without the trace."""
    return _penalty(displacement, _Scores(velocity, x, affine), rule, want_gradient, False)[:2]


def _penalty(
    displacement: Tensor, scores: _Scores, rule: PenaltyRule, want_gradient: bool, want_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values, x = scores.values, scores.x
    *lead, num_samples, d = values.shape
    want_trace = want_trace and rule.normalize
    out = displacement.new_empty(lead, dtype=torch.float32)
    gradient = displacement.new_empty((*lead, d) if want_gradient else 0, dtype=torch.float32)
    trace = displacement.new_empty(lead if want_trace else 0, dtype=torch.float32)
    if out.numel() == 0:
        return out, gradient, trace
    affine = scores.affine or Affine(None, 1.0, 0.0, False)
    pairs, layout = affine.of_rows((*lead, num_samples))
    tile = penalty_tile(gpu_of(values.device), "penalty", num_samples, d, values.element_size())
    with torch.cuda.device_of(values):
        penalty_kernel[(-(-out.numel() // tile.rows),)](
            displacement.contiguous(),
            values.contiguous(),
            x.contiguous() if x is not None and affine.use_x else out,  # what a kernel does not read may be any tensor
            out if pairs is None else pairs,
            out,
            gradient,
            trace,
            out.numel(),
            affine.p,
            affine.q,
            rule.damping,
            rule.eps,
            K=num_samples,
            D=d,
            ROWS=tile.rows,
            BLOCK_K=tile.block_k,
            BLOCK_D=tile.block_d,
            NORMALIZE=rule.normalize,
            SCORE=scores.kind,
            COEFFICIENTS=layout,
            GRADIENT=want_gradient,
            TRACE=want_trace,
            num_warps=tile.num_warps,
        )
    return out, gradient, trace


def score_gradient(
    upstream: Tensor, displacement: Tensor, score: Tensor, penalty: Tensor, trace: Tensor, rule: PenaltyRule
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
            rule.eps,
            K=num_samples,
            D=d,
            ROWS=tile.rows,
            BLOCK_K=tile.block_k,
            BLOCK_D=tile.block_d,
            NORMALIZE=rule.normalize,
            num_warps=tile.num_warps,
        )
    return out
