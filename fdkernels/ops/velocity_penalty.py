"""velocity_fisher_penalty: displacement (..., d), velocity, x (..., K, d) -> penalty (...), its gradient to δ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import any_requires_grad
from fdkernels.dtypes import accumulate_dtype
from fdkernels.ops.penalty import differentiable_gradients, penalty_from_score, scaled
from fdkernels.ops.register import Gradient, register
from fdkernels.ops.score import score_formula, score_from_velocity
from fdkernels.records import Affine, PenaltyRule, ScoreRule


class Call(NamedTuple):
    displacement: Tensor
    velocity: Tensor
    x: Tensor
    affine: Affine
    rule: PenaltyRule
    want_gradient: bool


def penalty_from_velocity(
    displacement: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    score_rule: ScoreRule,
    rule: PenaltyRule,
    triton: bool,
) -> Tensor:
    """The penalty, on checked arguments."""
    dtype = accumulate_dtype(velocity, x)
    if triton and not (torch.is_grad_enabled() and any_requires_grad(velocity, x, t)):
        affine = score_rule.affine(t, velocity, x)
        return _operator(Call(displacement, velocity, x, affine, rule, False))[0]
    # intermediate scores are not rounded to half precision
    score = score_from_velocity(velocity.to(dtype), x.to(dtype), t, score_rule, triton)
    return penalty_from_score(displacement, score, rule, triton)


def _body(call: Call) -> tuple[Tensor, Tensor]:
    from fdkernels.kernels.penalty import launch

    return launch.velocity_penalty(*call)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    displacement = call.displacement
    return (
        displacement.new_empty(displacement.shape[:-1], dtype=torch.float32),
        displacement.new_empty(displacement.shape if call.want_gradient else 0, dtype=torch.float32),
    )


class _Gradient(Gradient):
    """Differentiable in δ only. If more is asked, ``penalty_from_velocity`` composes two other operators."""

    @staticmethod
    def forward(ctx: Any, call: Call, values: Callable[[Call], Any]) -> tuple[Tensor, Tensor]:
        penalty, gradient = values(call._replace(want_gradient=True))
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.displacement, call.velocity, call.x, call.affine.pairs, gradient)
        ctx.numbers, ctx.rule = call.affine[1:], call.rule  # a tensor is only to be saved as one
        return penalty, gradient

    @staticmethod
    def backward(ctx: Any, needs: Call, *upstream: Tensor | None) -> dict[str, Tensor | None]:
        if needs.velocity or needs.x or needs.affine.pairs:
            raise RuntimeError("torch.ops.fdkernels.velocity_fisher_penalty is differentiable in displacement only")
        to_penalty = upstream[0]
        if to_penalty is None:
            return {}
        displacement, velocity, x, pairs, gradient = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return {"displacement": scaled(gradient, to_penalty, displacement)}
        score = score_formula(velocity.to(gradient.dtype), x, Affine(pairs, *ctx.numbers))
        return differentiable_gradients(to_penalty, {"displacement": displacement}, displacement, score, ctx.rule)


_operator = register("velocity_fisher_penalty", Call, "(Tensor, Tensor)", _body, _fake, gradient=_Gradient)
