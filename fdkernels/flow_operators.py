"""The two operators over a fused flow: integration, and on to the Fisher penalty; and what a module becomes for them.

Rows come as (models, rows, d), and weights either as a module holds them or stacked over the models: that is what
``torch.func.vmap`` over parameters makes of them, so that many networks are integrated at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fdkernels.mlp import PackedMLP
from fdkernels.registration import register
from fdkernels.solvers import METHODS, Method
from fdkernels.torch_private import constant_when_compiled

Parameters = list[Tensor | None]


@functools.lru_cache(maxsize=64)
def solver_table(times: tuple[float, ...], method: Method) -> tuple[float, ...]:
    """What the kernel reads: for each evaluation time, reach, weight, and whether the step ends. No times, no lines."""
    table: list[float] = []
    for t, next_t in itertools.pairwise(times):
        h, stages = next_t - t, METHODS[method]
        for i, stage in enumerate(stages):
            table += [t + stage.at * h, stage.reach * h, stage.weight * h, float(i == len(stages) - 1)]
    return tuple(table)


@constant_when_compiled
def prepare_solver(times: tuple[float, ...], method: Method, device: torch.device) -> None:
    """Put the solver's table on the device while a graph is traced, for good.

    When the traced graph runs for the first time, memory may be that of a CUDA graph that is about to be recorded.
    """
    from fdkernels.kernels.architecture import device_table

    device_table(solver_table(times, method), device)


def architecture_and_parameters(mlp: PackedMLP) -> tuple[str, Parameters]:
    """The operators' view of a packed MLP: for each layer weight, bias, and scale and shift of its layer norm."""
    from fdkernels.kernels.architecture import Architecture

    parameters: Parameters = []
    norms: list[nn.LayerNorm | None] = []
    for layer in mlp.layers:
        norm = layer.norm_before or layer.norm_after
        norms.append(norm)
        parameters += [layer.linear.weight, layer.linear.bias]
        parameters += [None, None] if norm is None else [norm.weight, norm.bias]
    hidden = mlp.layers[:-1]
    architecture = Architecture(
        cond_dim=mlp.cond_dim,
        action_dim=mlp.action_dim,
        order=mlp.order,
        widths=tuple(layer.linear.weight.shape[0] for layer in hidden),
        activations=tuple(layer.activation or "none" for layer in hidden),
        norms=tuple("before" if layer.norm_before else "after" if layer.norm_after else "none" for layer in hidden),
        norm_eps=tuple(norm.eps if norm else 0.0 for norm in norms[:-1]),
    )
    return architecture.encode(), [None if parameter is None else parameter.detach() for parameter in parameters]


def _fold(batch_size: int, dims: Any, tensors: list[Tensor | None], parameters: Parameters) -> tuple[list, Parameters]:
    """Under vmap: a mapped dimension becomes one of models where the weights are mapped too, and one of rows if not.

    ``dims`` are those of the tensors, and last of the parameters. Unmapped tensors (models, rows, ...) are repeated.
    """
    *tensor_dims, parameter_dims = dims

    def leading(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    moved = [leading(tensor, dim) for tensor, dim in zip(tensors, tensor_dims)]
    if any(dim is not None for dim in parameter_dims):
        stacked = [leading(parameter, dim) for parameter, dim in zip(parameters, parameter_dims)]
        return [None if tensor is None else tensor.flatten(0, 1) for tensor in moved], stacked
    return [None if tensor is None else tensor.transpose(0, 1).flatten(1, 2) for tensor in moved], parameters


def _unfold(out: Tensor, batch_size: int, by_model: bool, first: int = 0) -> tuple[Tensor, int | None]:
    """The mapped dimension again; ``first`` is the dimension of models. What was not wanted is empty."""
    if out.ndim == 1:
        return out, None
    at = first if by_model else first + 1
    return out.unflatten(at, (batch_size, out.shape[at] // batch_size)), at


# ---- integrate_flow: start (models, rows, d), cond (models, conds, c) -> end (models, rows, d), or all states


def _integrate(
    start: Tensor,
    cond: Tensor | None,
    parameters: Parameters,
    architecture: str,
    times: list[float],
    method: Method,
    *settings: Any,
) -> Tensor:
    from fdkernels.kernels import launch_flow

    return launch_flow.integrate(start, cond, parameters, architecture, solver_table(tuple(times), method), *settings)


def _integrate_fake(start: Tensor, *args: Any) -> Tensor:
    times, want_path = args[3], args[8]
    return start.new_empty((len(times), *start.shape) if want_path else start.shape)


def _integrate_vmap(
    info: Any, in_dims: Any, start: Tensor, cond: Tensor | None, parameters: Parameters, *rest: Any
) -> Any:
    (start, cond), parameters = _fold(info.batch_size, in_dims[:3], [start, cond], parameters)
    by_model = any(dim is not None for dim in in_dims[2])
    want_path = rest[6]
    return _unfold(integrate_operator(start, cond, parameters, *rest), info.batch_size, by_model, int(want_path))


integrate_operator = register(
    "integrate_flow",
    "(Tensor start, Tensor? cond, Tensor?[] parameters, str architecture, float[] times, str method, float low, "
    "float high, str clip, bool want_path, str precision, str? implementation) -> Tensor",
    _integrate,
    _integrate_fake,
    _integrate_vmap,
)


# ---- flow_fisher_penalty: noise (models, states·K, d), displacement (models, states, d) -> penalty (models, states)


def _fisher(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fdkernels.kernels import launch_flow

    times, method = args[8:10]
    arguments: list[Any] = [*args[:8], solver_table(tuple(times), method), *args[10:]]
    return launch_flow.fisher(*arguments)


def _fisher_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    displacement, num_samples, want_score = args[3], args[13], args[21]
    models, states, d = displacement.shape
    return (
        displacement.new_empty((models, states), dtype=torch.float32),
        displacement.new_empty((models, states, d), dtype=torch.float32),
        displacement.new_empty((models, states, num_samples, d) if want_score else 0, dtype=torch.float32),
    )


def _fisher_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    assert args[6] is None, "under vmap noise is drawn before the operator, whose positions count all models' rows"
    tensors, parameters = _fold(info.batch_size, in_dims[:6], list(args[:5]), args[5])
    by_model = any(dim is not None for dim in in_dims[5])
    outputs = fisher_operator(*tensors, parameters, *args[6:])
    return tuple(zip(*(_unfold(out, info.batch_size, by_model) for out in outputs)))


class _Fisher(torch.autograd.Function):
    """Differentiable in the displacement only; its gradient was left behind by the forward pass."""

    @staticmethod
    def forward(ctx: Any, values: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        penalty, gradient, score = values(*args)
        ctx.mark_non_differentiable(gradient, score)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        ctx.dtype = args[3].dtype
        return penalty, gradient, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        to_displacement = None if upstream is None else (upstream.unsqueeze(-1) * gradient).to(ctx.dtype)
        return (*[None] * 4, to_displacement, *[None] * 20)


fisher_operator = register(
    "flow_fisher_penalty",
    "(Tensor? start, Tensor? bridge, Tensor? cond, Tensor displacement, Tensor? coefficients, Tensor?[] parameters, "
    "Tensor? seed, str architecture, float[] times, str method, float low, float high, str clip, int num_samples, "
    "float t, float p, float q, bool use_x, float damping, bool normalize, float eps, bool want_score, "
    "str precision, str? implementation) -> (Tensor, Tensor, Tensor)",
    _fisher,
    _fisher_fake,
    _fisher_vmap,
    _Fisher,
)
