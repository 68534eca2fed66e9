"""fisher_penalty: displacement (..., d), score (..., K, d) -> penalty (...), its gradient to δ, tr F."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import plain_is_better
from fdkernels.dtypes import accumulate_dtype
from fdkernels.ops.register import Gradient, register
from fdkernels.ops.score_gradient import score_gradient
from fdkernels.records import PenaltyRule


class Call(NamedTuple):
    displacement: Tensor
    score: Tensor
    rule: PenaltyRule
    want_gradient: bool
    want_trace: bool
    triton: bool


def penalty_from_score(displacement: Tensor, score: Tensor, rule: PenaltyRule, triton: bool) -> Tensor:
    """The penalty, on checked arguments."""
    if not triton and plain_is_better(displacement, score):
        return penalty_formula(displacement, score, rule)[0]
    return _operator(Call(displacement, score, rule, False, False, triton))[0]


def penalty_formula(
    displacement: Tensor, score: Tensor, rule: PenaltyRule, want_gradient: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """δᵀF̂δ/d in O(K·d), its gradient to δ if wanted, and tr F if the rule normalises by it."""
    dtype = accumulate_dtype(displacement, score)
    displacement, score = displacement.to(dtype), score.to(dtype)
    num_samples, d = score.shape[-2:]
    projection = (score * displacement.unsqueeze(-2)).sum(-1)
    numerator = torch.add(projection.square().mean(-1), displacement.square().sum(-1), alpha=rule.damping)
    trace = None
    denominator: float | Tensor = d
    if rule.normalize:
        trace = score.square().sum((-2, -1)) / num_samples + rule.damping * d
        denominator = trace.clamp(min=rule.eps * d)
    penalty, gradient = numerator / denominator, None
    if want_gradient:
        pull = torch.add((projection.unsqueeze(-1) * score).mean(-2), displacement, alpha=rule.damping)
        gradient = 2 * pull / (denominator.unsqueeze(-1) if isinstance(denominator, Tensor) else denominator)
    return penalty, gradient, trace


def _body(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    if call.triton:
        from fdkernels.kernels.penalty import launch

        return launch.penalty(call.displacement, call.score, call.rule, call.want_gradient, call.want_trace)
    penalty, gradient, trace = penalty_formula(call.displacement, call.score, call.rule, call.want_gradient)
    return (
        penalty.contiguous(),
        penalty.new_empty(0) if gradient is None else gradient.contiguous(),
        trace.contiguous() if trace is not None and call.want_trace else penalty.new_empty(0),
    )


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    displacement = call.displacement
    dtype, lead = accumulate_dtype(displacement, call.score), displacement.shape[:-1]
    return (
        displacement.new_empty(lead, dtype=dtype),
        displacement.new_empty(displacement.shape if call.want_gradient else 0, dtype=dtype),
        displacement.new_empty(lead if call.want_trace and call.rule.normalize else 0, dtype=dtype),
    )


class _Gradient(Gradient):
    """The forward pass saves the gradient to δ, so that the scores need not be read twice."""

    @staticmethod
    def forward(ctx: Any, call: Call, values: Callable[[Call], Any]) -> tuple[Tensor, Tensor, Tensor]:
        wanted = call.want_gradient or call.displacement.requires_grad, call.want_trace or call.score.requires_grad
        penalty, gradient, trace = values(Call(call.displacement, call.score, call.rule, *wanted, call.triton))
        ctx.mark_non_differentiable(gradient, trace)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.displacement, call.score, penalty, gradient, trace)
        ctx.rule, ctx.triton = call.rule, call.triton
        return penalty, gradient, trace

    @staticmethod
    def backward(ctx: Any, needs: Call, *upstream: Tensor | None) -> dict[str, Tensor | None]:
        to_penalty = upstream[0]
        if to_penalty is None:
            return {}
        displacement, score, penalty, gradient, trace = ctx.saved_tensors
        if torch.is_grad_enabled():
            wrt = {"displacement": displacement} if needs.displacement else {}
            wrt |= {"score": score} if needs.score else {}
            return differentiable_gradients(to_penalty, wrt, displacement, score, ctx.rule)
        found: dict[str, Tensor | None] = {}
        if needs.displacement:
            found["displacement"] = scaled(gradient, to_penalty, displacement)
        if needs.score:
            found["score"] = score_gradient(
                to_penalty, displacement, score, penalty, trace, ctx.rule, triton=ctx.triton
            )
        return found


def scaled(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    return (upstream.unsqueeze(-1) * gradient).to(like.dtype)


def differentiable_gradients(
    upstream: Tensor, wrt: dict[str, Tensor], displacement: Tensor, score: Tensor, rule: PenaltyRule
) -> dict[str, Tensor | None]:
    """Gradients that can be differentiated again (``create_graph=True``): those of the plain formula."""
    penalty = penalty_formula(displacement, score, rule)[0]
    return dict(zip(wrt, torch.autograd.grad(penalty, list(wrt.values()), upstream, create_graph=True)))


_operator = register("fisher_penalty", Call, "(Tensor, Tensor, Tensor)", _body, _fake, gradient=_Gradient)
