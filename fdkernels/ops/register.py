"""Register an operator with ``torch.library``: its body, its output shapes, a vmap rule and a gradient.

An operator's arguments are a record: a ``NamedTuple`` of tensors, options and records of these. Its flattened fields
are the schema. Body, shapes, vmap rule and gradient all receive the record; only this module flattens one.

The operators use a bare ``torch.library.Library`` and an autograd function of their own. That takes less host time than
``torch.library.custom_op``, which matters at a batch of 256. Autocast does not change them: every floating dtype is
read as it is, and computed in float32 at least.
"""

from __future__ import annotations

import abc
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdkernels.backend import any_requires_grad
from fdkernels.torch_private import applied_directly, transforms_active

_LIBRARY = torch.library.Library("fdkernels", "DEF")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor | None]: "Tensor?[]",
    list[float]: "float[]",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
    str: "str",
    str | None: "str?",
}


class Gradient(abc.ABC):
    """An operator's forward and backward pass, used if a gradient is wanted."""

    twice = True
    """Whether the backward pass can itself be differentiated."""

    @staticmethod
    @abc.abstractmethod
    def forward(ctx: Any, call: Any, values: Callable[[Any], Any]) -> Any:
        """Compute what the operator returns.

        Args:
            call: the operator's arguments.
            values: the same operator without a gradient.
        """

    @staticmethod
    @abc.abstractmethod
    def backward(ctx: Any, needs: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:
        """The gradients by argument name; ``needs`` is the record of arguments with True where one is wanted."""


class Layout:
    """Flattens a record of arguments, and rebuilds it."""

    def __init__(self, record: type) -> None:
        self.names: list[str] = []
        schema, lift, flat = [], [], []
        classes: dict[str, type] = {"record": record}
        for i, (name, kind) in enumerate(typing.get_type_hints(record).items()):
            inner = typing.get_type_hints(kind) if hasattr(kind, "_fields") else {name: kind}
            at = [f"args[{j}]" for j in range(len(self.names), len(self.names) + len(inner))]
            if hasattr(kind, "_fields"):
                classes[f"part{i}"] = kind
                lift.append(f"new(part{i}, ({', '.join(at)},))")
                flat.append(f"*call[{i}]")
            else:
                lift += at
                flat.append(f"call[{i}]")
            self.names += inner
            schema += [f"{_TYPES[leaf]} {leaf_name}" for leaf_name, leaf in inner.items()]
        self.schema = f"({', '.join(schema)})"
        # Generated as code, like the constructors of named tuples, because they run several times in every call.
        names = classes | {"new": tuple.__new__}
        self.lift: Callable[[Sequence[Any]], Any] = eval(f"lambda args: new(record, ({', '.join(lift)},))", names)
        self.flat: Callable[[Any], tuple[Any, ...]] = eval(f"lambda call: ({', '.join(flat)},)", names)


def register(
    name: str,
    record: type,
    returns: str,
    body: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    vmap: Callable[[Any, Any, Any], Any] | None = None,
    gradient: type[Gradient] | None = None,
) -> Callable[[Any], Any]:
    """Define fdkernels::name, and return it as a function of its record.

    Args:
        returns: the return type in the schema.
        fake: makes outputs of the body's shapes, without data.
        vmap: takes ``info``, the record of mapped dimensions and the record of arguments; returns outputs and their
            dimensions. None for an operator that takes any leading shape: the mapped dimension becomes the first.
        gradient: its ``values`` are registered too, as fdkernels::name_values, which a compiler sees below autograd.
    """
    layout = Layout(record)
    operator = _define(name, layout, returns, body, fake)

    def any_leading_shape(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        out = operator(*(_leading(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims)))
        if isinstance(out, Tensor):
            return out, 0
        # an output that is not wanted is empty
        return out, tuple(None if part.shape == (0,) and info.batch_size else 0 for part in out)

    def own_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        assert vmap is not None
        return vmap(info, layout.lift(in_dims), layout.lift(args))

    torch.library.register_vmap(f"fdkernels::{name}", own_rule if vmap else any_leading_shape, lib=_LIBRARY)
    if gradient is not None:
        _add_gradient(name, layout, gradient, _define(f"{name}_values", layout, returns, body, fake))
    flat = layout.flat
    return lambda call: operator(*flat(call))


def _define(name: str, layout: Layout, returns: str, body: Callable, fake: Callable) -> Callable[..., Any]:
    _LIBRARY.define(f"{name}{layout.schema} -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    lift = layout.lift
    _LIBRARY.impl(name, lambda *args: body(lift(args)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdkernels::{name}", lambda *args: fake(lift(args)), lib=_LIBRARY)
    return getattr(torch.ops.fdkernels, name).default


def _add_gradient(name: str, layout: Layout, gradient: type[Gradient], values_operator: Callable[..., Any]) -> None:
    lift, flat = layout.lift, layout.flat

    def values(call: Any) -> Any:
        return values_operator(*flat(call))

    def run_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradient.backward(ctx, lift(ctx.needs_input_grad), *upstream)
        return tuple(map(found.get, layout.names))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return gradient.forward(ctx, lift(args), values)

        backward: Any = staticmethod(run_backward if gradient.twice else once_differentiable(run_backward))

    apply = applied_directly(Function)

    def dispatch(*args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*args):
            if transforms_active():
                raise RuntimeError(f"{name}: torch.func gradients need backend='torch'")
            return apply(*args)
        return values_operator(*args)

    _LIBRARY.impl(name, dispatch, "Autograd")


def _leading(arg: Any, dim: int | None, batch_size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
