"""flow_fisher_penalty: noise (models, states·K, d), displacement (models, states, d) -> penalty (models, states).

It also returns the gradient to the displacement and, if wanted, scores (models, states, K, d). It has no PyTorch body:
where the kernels do not serve, the public function goes step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdkernels.ops.models import fold, unfold
from fdkernels.ops.register import Gradient, register
from fdkernels.records import Chain


def chain(call: Chain) -> tuple[Tensor, Tensor]:
    """Penalty (1, states) and scores (1, states, K, d), float32."""
    penalty, _, score = _operator(call)
    return penalty, score


def _body(call: Chain) -> tuple[Tensor, Tensor, Tensor]:
    from fdkernels.kernels.flow import launch

    return launch.fisher(call)


def _fake(call: Chain) -> tuple[Tensor, Tensor, Tensor]:
    displacement, num_samples = call.displacement, call.noise.num_samples
    models, states, d = displacement.shape
    return (
        displacement.new_empty((models, states), dtype=torch.float32),
        displacement.new_empty((models, states, d), dtype=torch.float32),
        displacement.new_empty((models, states, num_samples, d) if call.want_score else 0, dtype=torch.float32),
    )


def _vmap(info: Any, dims: Chain, call: Chain) -> Any:
    seed = call.noise.seed
    assert seed is None, "under vmap noise is drawn before the operator, whose positions count all models' rows"
    outputs = _operator(fold(info.batch_size, call, dims))
    return tuple(zip(*(unfold(out, info.batch_size, dims) for out in outputs)))


class _Gradient(Gradient):
    """Differentiable in the displacement only, whose gradient the forward pass saved."""

    twice = False

    @staticmethod
    def forward(ctx: Any, call: Chain, values: Callable[[Chain], Any]) -> tuple[Tensor, Tensor, Tensor]:
        penalty, gradient, score = values(call)
        ctx.mark_non_differentiable(gradient, score)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        ctx.dtype = call.displacement.dtype
        return penalty, gradient, score

    @staticmethod
    def backward(ctx: Any, needs: Chain, *upstream: Tensor | None) -> dict[str, Tensor | None]:
        (gradient,) = ctx.saved_tensors
        to_penalty = upstream[0]
        return {"displacement": None if to_penalty is None else (to_penalty.unsqueeze(-1) * gradient).to(ctx.dtype)}


_operator = register("flow_fisher_penalty", Chain, "(Tensor, Tensor, Tensor)", _body, _fake, _vmap, _Gradient)
