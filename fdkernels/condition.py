"""What a velocity is conditioned on: a tensor, or dicts, tuples and lists of tensors, with the rows' leading shape.

A plain tensor may be (..., c), whose leading shape broadcasts from the right as shapes do in PyTorch. Everything else,
such as tokens (..., T, c) with a mask (..., T), has the leading dimensions first, each of the rows' size or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fdkernels.validation import brief, check_broadcast, check_dense, check_floating, is_sequence

Condition: TypeAlias = "Tensor | Mapping[Any, Any] | Sequence[Any] | None"
_DEEPEST = 16
"""Deeper nesting is treated as a mistake."""


def check_condition(
    op: str, name: str, cond: Condition, lead: torch.Size, device: torch.device, like: str, broadcasts: bool = True
) -> None:
    """Check that all tensors are on the device, and have the leading shape ``lead`` or, by default, broadcast to it.

    Args:
        like: the argument that has this leading shape, for messages.
        broadcasts: False if there must be a state for each of the rows.
    """
    n = len(lead)
    for label, part in _parts(op, name, cond, 0):
        plain = part is cond
        check_tensors = check_floating if plain else check_dense
        check_tensors(op, device, **{label: part})
        if plain and part.ndim == 0:
            raise ValueError(f"{op}: {label} must be (..., c), got a scalar")
        if broadcasts and (plain or part.ndim >= n):
            own = min(n, part.ndim - 1) if plain else n
            wants = (
                f"(..., c) with {like}'s leading shape" if plain else f"{like}'s leading shape and any other dimensions"
            )
            check_broadcast(op, label, part, (*lead, *part.shape[own:]), wants)
        elif part.shape[:n] != lead or (plain and part.ndim == n):
            form = "be (..., c) with" if plain else "begin with"
            raise ValueError(f"{op}: {label} must {form} {like}'s leading shape {tuple(lead)}, got {tuple(part.shape)}")


def _parts(op: str, name: str, cond: Condition, depth: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a structure, each with its name."""
    if cond is None:
        return
    if isinstance(cond, Tensor):
        yield name, cond
        return
    if depth == _DEEPEST or not (isinstance(cond, Mapping) or is_sequence(cond)):
        raise TypeError(f"{op}: {name} must be a tensor, None, or a dict, tuple or list of these, got {brief(cond)}")
    named = cond.items() if isinstance(cond, Mapping) else enumerate(cond)
    for key, part in named:
        yield from _parts(op, f"{name}[{key!r}]", part, depth + 1)


def each(function: Callable[[Tensor], Tensor], cond: Condition) -> Any:
    """The same structure, with the function applied to every tensor."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else function(cond)
    if isinstance(cond, Mapping):
        return {name: each(function, part) for name, part in cond.items()}
    parts = [each(function, part) for part in cond]
    if isinstance(cond, tuple):
        return type(cond)(*parts) if hasattr(cond, "_fields") else tuple(parts)
    return parts


def spread(cond: Condition, lead: torch.Size) -> Any:
    """The condition with the leading shape ``lead``, to which it broadcasts."""
    n = len(lead)
    if isinstance(cond, Tensor):
        rest = cond.shape[min(n, cond.ndim - 1) :]
        shape = (*lead, *rest)
        return cond if cond.shape == shape else cond.expand(shape)
    return each(lambda part: part.expand(*lead, *part.shape[n:]), cond)


def for_samples(cond: Condition, lead: torch.Size) -> Any:
    """The condition of states with this leading shape, to be spread over the samples of each: (..., 1, c)."""
    return each(lambda part: part.unsqueeze(len(lead)), cond)


def joined(cond: Condition, lead: torch.Size) -> Any:
    """The condition of all rows, which has this leading shape, with one leading dimension."""
    return each(lambda part: part.reshape(lead.numel(), *part.shape[len(lead) :]), cond)
