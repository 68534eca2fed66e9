"""velocity_to_score: velocity, x (..., d), coefficients (p, q) as (..., 2) or numbers -> p·v + q·x (..., d)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import plain_is_better
from fdkernels.dtypes import accumulate_dtype
from fdkernels.ops.register import Gradient, register
from fdkernels.records import Affine, ScoreRule


class Call(NamedTuple):
    velocity: Tensor
    x: Tensor
    affine: Affine
    triton: bool


def score_from_velocity(
    velocity: Tensor, x: Tensor, t: Tensor | float, rule: ScoreRule, triton: bool = False
) -> Tensor:
    """The conversion, on checked arguments."""
    affine = rule.affine(t, velocity, x)
    if not triton and plain_is_better(velocity, x, affine.pairs):
        return score_formula(velocity, x, affine)
    return _operator(Call(velocity, x, affine, triton))


def score_formula(velocity: Tensor, x: Tensor, affine: Affine) -> Tensor:
    """p·v + q·x, or p·v, in the promoted dtype of v and x."""
    out_dtype = torch.promote_types(velocity.dtype, x.dtype)
    dtype = accumulate_dtype(velocity, x)
    pairs = affine.pairs
    out = velocity.to(dtype) * (affine.p if pairs is None else pairs[..., :1])
    if affine.use_x:
        out = out + x.to(dtype) * (affine.q if pairs is None else pairs[..., 1:])
    return out.to(out_dtype)


def _body(call: Call) -> Tensor:
    if call.triton:
        from fdkernels.kernels.score import launch

        return launch.score(call.velocity, call.x, call.affine)
    return score_formula(call.velocity, call.x, call.affine).contiguous()


def _fake(call: Call) -> Tensor:
    velocity = call.velocity
    return velocity.new_empty(velocity.shape, dtype=torch.promote_types(velocity.dtype, call.x.dtype))


class _Gradient(Gradient):
    """The score is linear in v and x. The backward pass is plain PyTorch and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, call: Call, values: Callable[[Call], Any]) -> Tensor:
        pairs, *ctx.numbers = call.affine
        points = (call.velocity, call.x) if pairs is not None and pairs.requires_grad else ()
        ctx.save_for_backward(pairs, *points)
        ctx.dtypes = call.velocity.dtype, call.x.dtype
        return values(call)

    @staticmethod
    def backward(ctx: Any, needs: Call, *upstream: Tensor | None) -> dict[str, Tensor | None]:
        (to_score,) = upstream
        assert to_score is not None
        pairs, *points = ctx.saved_tensors
        p, q, use_x = ctx.numbers
        if pairs is not None:
            p, q = pairs[..., :1], pairs[..., 1:]
        velocity_dtype, x_dtype = ctx.dtypes
        found: dict[str, Tensor | None] = {}
        if needs.velocity:
            found["velocity"] = (to_score * p).to(velocity_dtype)
        if needs.x and use_x:
            found["x"] = (to_score * q).to(x_dtype)
        if needs.affine.pairs:
            wide = to_score.to(pairs.dtype)
            velocity, x = points
            along_x = (wide * x).sum(-1) if use_x else torch.zeros_like(wide[..., 0])
            found["pairs"] = torch.stack(((wide * velocity).sum(-1), along_x), -1).sum_to_size(pairs.shape)
        return found


_operator = register("velocity_to_score", Call, "Tensor", _body, _fake, gradient=_Gradient)
