"""How an operator joins ``torch.library``: one body, its shapes without data, a vmap rule, a gradient.

The operators sit on a bare ``torch.library.Library`` with an autograd function of their own, which takes less of the
host's time than ``torch.library.custom_op``; that counts at a batch of 256. Under autocast they run as they are: every
floating dtype is read as it comes, and computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdkernels.torch_private import transforms_active

_LIBRARY = torch.library.Library("fdkernels", "DEF")


def register(
    name: str,
    signature: str,
    body: Callable,
    fake: Callable,
    vmap: Callable | None = None,
    gradient: type[torch.autograd.Function] | None = None,
) -> Callable[..., Any]:
    """Define fdkernels::name; ``fake`` takes the body's arguments and returns outputs of its shapes without data.

    An operator that takes any leading shape needs no ``vmap`` rule of its own: the mapped dimension becomes the first.
    ``gradient.forward`` gets, before the operator's arguments, the same operator without a gradient; that one is
    registered too, as fdkernels::name_values, and is what a compiler finds below autograd.
    """
    operator = _define(name, signature, body, fake)

    def any_leading_shape(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        out = operator(*(_leading(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims)))
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(None if part.shape == (0,) else 0 for part in out)  # what was not wanted is empty

    torch.library.register_vmap(f"fdkernels::{name}", vmap or any_leading_shape, lib=_LIBRARY)
    if gradient is not None:
        _give(name, gradient, _define(f"{name}_values", signature, body, fake))
    return operator


def _define(name: str, signature: str, body: Callable, fake: Callable) -> Callable[..., Any]:
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fdkernels, name).default


def _give(name: str, gradient: type[torch.autograd.Function], values: Callable[..., Any]) -> None:
    def dispatch(*args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*args):
            if transforms_active():
                raise RuntimeError(f"{name}: torch.func gradients need backend='torch'")
            return gradient.apply(values, *args)
        return values(*args)

    _LIBRARY.impl(name, dispatch, "Autograd")


def _leading(arg: Any, dim: int | None, batch_size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)


def any_requires_grad(*args: Any) -> bool:
    """Whether one of the tensors does, also of those in lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, list) and any_requires_grad(*arg):
            return True
    return False
