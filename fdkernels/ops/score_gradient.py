"""fisher_penalty_score_gradient: the penalty's gradient to the scores, from what its forward pass saved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.ops.register import register
from fdkernels.records import PenaltyRule


class Call(NamedTuple):
    upstream: Tensor
    displacement: Tensor
    score: Tensor
    penalty: Tensor
    trace: Tensor
    rule: PenaltyRule


def score_gradient(
    upstream: Tensor,
    displacement: Tensor,
    score: Tensor,
    penalty: Tensor,
    trace: Tensor,
    rule: PenaltyRule,
    *,
    triton: bool,
) -> Tensor:
    """upstream · ∂penalty/∂score, (..., K, d) in the dtype of the score."""
    call = Call(upstream, displacement, score, penalty, trace, rule)
    return _operator(call) if triton else _formula(call)


def _formula(call: Call) -> Tensor:
    dtype, rule = call.penalty.dtype, call.rule
    displacement, score = call.displacement.to(dtype).unsqueeze(-2), call.score.to(dtype)
    num_samples, d = score.shape[-2:]
    scale = call.upstream * (2 / num_samples)
    gradient = (score * displacement).sum(-1, keepdim=True) * displacement
    if rule.normalize:
        scale = scale / call.trace.clamp(min=rule.eps * d)
        gradient = gradient - torch.where(call.trace < rule.eps * d, 0, call.penalty)[..., None, None] * score
    else:
        scale = scale / d
    return (scale[..., None, None] * gradient).to(call.score.dtype)


def _body(call: Call) -> Tensor:
    from fdkernels.kernels.penalty import launch

    return launch.score_gradient(*call)


_operator = register(
    "fisher_penalty_score_gradient", Call, "Tensor", _body, lambda call: call.score.new_empty(call.score.shape)
)
