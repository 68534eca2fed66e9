"""The three operators: each with a PyTorch and a Triton body or a Triton body alone, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdkernels.registration import any_requires_grad, register
from fdkernels.torch_private import transforms_active


def plain_is_better(*tensors: Tensor | None) -> bool:
    """On the PyTorch path, whether a plain formula serves better than an operator around it.

    It does where a compiler or a ``torch.func`` transform looks on, which make more of it, and where no gradient is
    wanted: sparing autograd's work is what the operator is for.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return True
    return not (torch.is_grad_enabled() and any_requires_grad(*tensors))


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# ---- fisher_penalty: displacement (..., d), score (..., K, d) -> penalty (...), its gradient to δ, the trace


def penalty_formula(
    displacement: Tensor, score: Tensor, damping: float, normalize: bool, eps: float, want_gradient: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """δᵀF̂δ/d in O(K·d), its gradient to δ where wanted, and tr F where it normalises."""
    dtype = accumulate_dtype(displacement, score)
    displacement, score = displacement.to(dtype), score.to(dtype)
    num_samples, d = score.shape[-2:]
    projection = (score * displacement.unsqueeze(-2)).sum(-1)
    numerator = torch.add(projection.square().mean(-1), displacement.square().sum(-1), alpha=damping)
    trace = None
    denominator: float | Tensor = d
    if normalize:
        trace = score.square().sum((-2, -1)) / num_samples + damping * d
        denominator = trace.clamp(min=eps * d)
    penalty, gradient = numerator / denominator, None
    if want_gradient:
        pull = torch.add((projection.unsqueeze(-1) * score).mean(-2), displacement, alpha=damping)
        gradient = 2 * pull / (denominator.unsqueeze(-1) if isinstance(denominator, Tensor) else denominator)
    return penalty, gradient, trace


def _score_gradient_formula(
    upstream: Tensor, displacement: Tensor, score: Tensor, penalty: Tensor, trace: Tensor, normalize: bool, eps: float
) -> Tensor:
    out_dtype, dtype = score.dtype, penalty.dtype
    displacement, score = displacement.to(dtype).unsqueeze(-2), score.to(dtype)
    num_samples, d = score.shape[-2:]
    scale = upstream * (2 / num_samples)
    gradient = (score * displacement).sum(-1, keepdim=True) * displacement
    if normalize:
        scale = scale / trace.clamp(min=eps * d)
        gradient = gradient - torch.where(trace < eps * d, 0, penalty)[..., None, None] * score
    else:
        scale = scale / d
    return (scale[..., None, None] * gradient).to(out_dtype)


def _penalty(
    displacement: Tensor,
    score: Tensor,
    damping: float,
    normalize: bool,
    eps: float,
    want_gradient: bool,
    want_trace: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from fdkernels.kernels import launch

        return launch.penalty(displacement, score, damping, normalize, eps, want_gradient, want_trace)
    penalty, gradient, trace = penalty_formula(displacement, score, damping, normalize, eps, want_gradient)
    return (
        penalty.contiguous(),
        penalty.new_empty(0) if gradient is None else gradient.contiguous(),
        trace.contiguous() if trace is not None and want_trace else penalty.new_empty(0),
    )


def _penalty_fake(
    displacement: Tensor,
    score: Tensor,
    damping: float,
    normalize: bool,
    eps: float,
    want_gradient: bool,
    want_trace: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, lead = accumulate_dtype(displacement, score), displacement.shape[:-1]
    return (
        displacement.new_empty(lead, dtype=dtype),
        displacement.new_empty(displacement.shape if want_gradient else 0, dtype=dtype),
        displacement.new_empty(lead if want_trace and normalize else 0, dtype=dtype),
    )


def _score_gradient(
    upstream: Tensor, displacement: Tensor, score: Tensor, penalty: Tensor, trace: Tensor, normalize: bool, eps: float
) -> Tensor:
    from fdkernels.kernels import launch

    return launch.penalty_score_gradient(upstream, displacement, score, penalty, trace, normalize, eps)


_score_gradient_operator = register(
    "fisher_penalty_score_gradient",
    "(Tensor upstream, Tensor displacement, Tensor score, Tensor penalty, Tensor trace, bool normalize, float eps) "
    "-> Tensor",
    _score_gradient,
    lambda upstream, displacement, score, penalty, trace, normalize, eps: score.new_empty(score.shape),
)


class _Penalty(torch.autograd.Function):
    """The forward pass leaves the gradient to δ behind: it has the scores at hand, and need not be read twice."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Callable[..., Any],
        displacement: Tensor,
        score: Tensor,
        damping: float,
        normalize: bool,
        eps: float,
        want_gradient: bool,
        want_trace: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, to_displacement, to_score, *_ = ctx.needs_input_grad
        settings = damping, normalize, eps
        wanted = want_gradient or to_displacement, want_trace or to_score
        penalty, gradient, trace = values(displacement, score, *settings, *wanted, triton)
        ctx.mark_non_differentiable(gradient, trace)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(displacement, score, penalty, gradient, trace)
        ctx.settings, ctx.triton = settings, triton
        return penalty, gradient, trace

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        displacement, score, penalty, gradient, trace = ctx.saved_tensors
        _, needs_displacement, needs_score, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            wrt = (displacement if needs_displacement else None, score if needs_score else None)
            return (None, *_differentiable(upstream, wrt, displacement, score, *ctx.settings), *[None] * 6)
        to_score = None
        if needs_score:
            function = _score_gradient_operator if ctx.triton else _score_gradient_formula
            to_score = function(upstream, displacement, score, penalty, trace, *ctx.settings[1:])
        return (None, _scaled(gradient, upstream, displacement) if needs_displacement else None, to_score, *[None] * 6)


def _scaled(gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
    return (upstream.unsqueeze(-1) * gradient).to(like.dtype)


def _differentiable(upstream: Tensor, wrt: tuple[Tensor | None, ...], *arguments: Any) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again (``create_graph=True``): those of the plain formula."""
    needed = [tensor for tensor in wrt if tensor is not None]
    found = iter(torch.autograd.grad(penalty_formula(*arguments)[0], needed, upstream, create_graph=True))
    return tuple(None if tensor is None else next(found) for tensor in wrt)


penalty_operator = register(
    "fisher_penalty",
    "(Tensor displacement, Tensor score, float damping, bool normalize, float eps, bool want_gradient, "
    "bool want_trace, bool triton) -> (Tensor, Tensor, Tensor)",
    _penalty,
    _penalty_fake,
    gradient=_Penalty,
)


# ---- velocity_to_score: velocity, x (..., d), coefficients (p, q) as (..., 2) or numbers -> p·v + q·x (..., d)


def score_formula(velocity: Tensor, x: Tensor, coefficients: Tensor | None, p: float, q: float, use_x: bool) -> Tensor:
    """p·v + q·x, or p·v, in the promoted dtype of v and x."""
    out_dtype = torch.promote_types(velocity.dtype, x.dtype)
    dtype = accumulate_dtype(velocity, x)
    out = velocity.to(dtype) * (p if coefficients is None else coefficients[..., :1])
    if use_x:
        out = out + x.to(dtype) * (q if coefficients is None else coefficients[..., 1:])
    return out.to(out_dtype)


def _score(
    velocity: Tensor, x: Tensor, coefficients: Tensor | None, p: float, q: float, use_x: bool, triton: bool
) -> Tensor:
    if triton:
        from fdkernels.kernels import launch

        return launch.score(velocity, x, coefficients, p, q, use_x)
    return score_formula(velocity, x, coefficients, p, q, use_x).contiguous()


class _Score(torch.autograd.Function):
    """Linear in v and x; its backward pass is plain PyTorch, and can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Callable[..., Any],
        velocity: Tensor,
        x: Tensor,
        coefficients: Tensor | None,
        p: float,
        q: float,
        use_x: bool,
        triton: bool,
    ) -> Tensor:
        needs_coefficients = ctx.needs_input_grad[3]
        ctx.save_for_backward(coefficients, *((velocity, x) if needs_coefficients else ()))
        ctx.numbers, ctx.use_x, ctx.dtypes = (p, q), use_x, (velocity.dtype, x.dtype)
        return values(velocity, x, coefficients, p, q, use_x, triton)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *points = ctx.saved_tensors
        p, q = ctx.numbers if coefficients is None else (coefficients[..., :1], coefficients[..., 1:])
        _, needs_velocity, needs_x, needs_coefficients, *_ = ctx.needs_input_grad
        velocity_dtype, x_dtype = ctx.dtypes
        to_coefficients = None
        if needs_coefficients:
            wide = upstream.to(coefficients.dtype)
            velocity, x = points
            along_x = (wide * x).sum(-1) if ctx.use_x else torch.zeros_like(wide[..., 0])
            to_coefficients = torch.stack(((wide * velocity).sum(-1), along_x), -1).sum_to_size(coefficients.shape)
        return (
            None,
            (upstream * p).to(velocity_dtype) if needs_velocity else None,
            (upstream * q).to(x_dtype) if needs_x and ctx.use_x else None,
            to_coefficients,
            *[None] * 4,
        )


score_operator = register(
    "velocity_to_score",
    "(Tensor velocity, Tensor x, Tensor? coefficients, float p, float q, bool use_x, bool triton) -> Tensor",
    _score,
    lambda velocity, x, *_: velocity.new_empty(velocity.shape, dtype=torch.promote_types(velocity.dtype, x.dtype)),
    gradient=_Score,
)


# ---- velocity_fisher_penalty: displacement (..., d), velocity, x (..., K, d) -> penalty (...), its gradient to δ


def _velocity_penalty(
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
    from fdkernels.kernels import launch

    return launch.velocity_penalty(
        displacement, velocity, x, coefficients, p, q, use_x, damping, normalize, eps, want_gradient
    )


def _velocity_penalty_fake(displacement: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    want_gradient = args[-1]
    return (
        displacement.new_empty(displacement.shape[:-1], dtype=torch.float32),
        displacement.new_empty(displacement.shape if want_gradient else 0, dtype=torch.float32),
    )


class _VelocityPenalty(torch.autograd.Function):
    """Differentiable in δ alone; the public function composes the two operators above where more is asked."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Callable[..., Any],
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
        affine, settings = (p, q, use_x), (damping, normalize, eps)
        penalty, gradient = values(displacement, velocity, x, coefficients, *affine, *settings, True)
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(displacement, velocity, x, coefficients, gradient)
        ctx.affine, ctx.settings = affine, settings
        return penalty, gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[2:]):
            raise RuntimeError("torch.ops.fdkernels.velocity_fisher_penalty is differentiable in displacement only")
        if upstream is None:
            return (None,) * 12
        displacement, velocity, x, coefficients, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            score = score_formula(velocity.to(gradient.dtype), x, coefficients, *ctx.affine)
            (to_displacement,) = _differentiable(upstream, (displacement,), displacement, score, *ctx.settings)
        else:
            to_displacement = _scaled(gradient, upstream, displacement)
        return (None, to_displacement, *[None] * 10)


velocity_penalty_operator = register(
    "velocity_fisher_penalty",
    "(Tensor displacement, Tensor velocity, Tensor x, Tensor? coefficients, float p, float q, bool use_x, "
    "float damping, bool normalize, float eps, bool want_gradient) -> (Tensor, Tensor)",
    _velocity_penalty,
    _velocity_penalty_fake,
    gradient=_VelocityPenalty,
)
