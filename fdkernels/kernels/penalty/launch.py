"""Launch the penalty's kernels: make inputs contiguous, allocate outputs, choose a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.kernels.penalty.kernel import penalty_kernel, score_gradient_kernel
from fdkernels.kernels.tuning.table import gpu_of
from fdkernels.kernels.tuning.tiles import penalty_tile
from fdkernels.records import Affine, PenaltyRule


class Scores(NamedTuple):
    """Given scores, or velocities and points that the kernel turns into scores p·v + q·x."""

    given: Tensor
    x: Tensor | None = None
    pairs: Tensor | None = None
    """(p, q) of each row, or of all rows; None if the numbers ``p`` and ``q`` serve all."""
    p: float = 1.0
    q: float = 0.0


def penalty(
    displacement: Tensor, score: Tensor, rule: PenaltyRule, want_gradient: bool, want_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty (...), its gradient to the displacement (..., d) and the trace (...), float32; empty if not wanted."""
    return _launch(displacement, Scores(score), ("given", "scalar"), rule, want_gradient, want_trace)


def velocity_penalty(
    displacement: Tensor, velocity: Tensor, x: Tensor, affine: Affine, rule: PenaltyRule, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same for s = p·v + q·x or s = p·v, without the trace."""
    pairs, layout = affine.of_rows(velocity.shape[:-1])
    scores = Scores(velocity, x if affine.use_x else None, pairs, affine.p, affine.q)
    kind = "velocity" if affine.use_x else "scaled"
    return _launch(displacement, scores, (kind, layout), rule, want_gradient, False)[:2]


def _launch(
    displacement: Tensor,
    scores: Scores,
    kind: tuple[str, str],
    rule: PenaltyRule,
    want_gradient: bool,
    want_trace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given, x = scores.given, scores.x
    *lead, num_samples, d = given.shape
    out = displacement.new_empty(lead, dtype=torch.float32)
    gradient = out.new_empty((*lead, d)) if want_gradient else None
    trace = out.new_empty(lead) if want_trace and rule.normalize else None
    if out.numel() > 0:
        tile = penalty_tile(gpu_of(given.device), "penalty", num_samples, d, given.element_size())
        with torch.cuda.device_of(given):
            penalty_kernel[(-(-out.numel() // tile.rows),)](
                displacement.contiguous(),
                scores._replace(given=given.contiguous(), x=None if x is None else x.contiguous()),
                out,
                gradient,
                trace,
                out.numel(),
                rule.damping,
                rule.eps,
                K=num_samples,
                D=d,
                TILE=tile,
                NORMALIZE=rule.normalize,
                SCORE=kind[0],
                COEFFICIENTS=kind[1],
                num_warps=tile.num_warps,
            )
    return out, out.new_empty(0) if gradient is None else gradient, out.new_empty(0) if trace is None else trace


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
            TILE=tile,
            NORMALIZE=rule.normalize,
            num_warps=tile.num_warps,
        )
    return out
