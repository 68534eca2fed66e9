"""How an operator joins ``torch.library``: one body, its shapes without data, a vmap rule, a gradient.

The operators sit on a bare ``torch.library.Library`` with an autograd function of their own, which is what
``torch.library.custom_op`` builds as well, less a good part of its host time; that counts at a batch of 256. Under
autocast they run as they are: every floating dtype is read as it comes, and computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fdkernels", "DEF")


def register(
    name: str, signature: str, body: Callable, fake: Callable, vmap: Callable | None = None
) -> torch._ops.OpOverload:
    """Define fdkernels::name; ``fake`` takes the body's arguments and returns outputs of its shapes without data.

    An operator that takes any leading shape needs no ``vmap`` rule of its own: the mapped dimension becomes the first.
    """
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdkernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fdkernels, name).default

    def any_leading_shape(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        out = operator(*(_leading(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims)))
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(None if part.shape == (0,) else 0 for part in out)  # what was not wanted is empty

    torch.library.register_vmap(f"fdkernels::{name}", vmap or any_leading_shape, lib=_LIBRARY)
    return operator


def _leading(arg: Any, dim: int | None, batch_size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)


def call_below_autograd(operator: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """The operator without its gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register_autograd(operator: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """Give the operator a gradient; ``function.forward`` gets the dispatch keys before the operator's arguments."""

    def dispatch(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(f"{operator._opname}: torch.func gradients need backend='torch'")
            return function.apply(keyset, *args)
        return call_below_autograd(operator, keyset, *args)

    _LIBRARY.impl(operator._opname, dispatch, "Autograd", with_keyset=True)
