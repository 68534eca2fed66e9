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


def check_condition(op: str, name: str, cond: Condition, lead: torch.Size, device: torch.device, like: str) -> None:
    """Check that all tensors are on the device, and that their leading shape broadcasts to ``lead``.

    Args:
        like: the argument that has this leading shape, for messages.
    """
    n = len(lead)
    if isinstance(cond, Tensor):
        check_floating(op, device, **{name: cond})
        if cond.ndim == 0:
            raise ValueError(f"{op}: {name} must be (..., c), got a scalar")
        rest = cond.shape[min(n, cond.ndim - 1) :]
        check_broadcast(op, name, cond, (*lead, *rest), f"(..., c) with {like}'s leading shape")
        return
    for label, part in _parts(op, name, cond, 0):
        check_dense(op, device, **{label: part})
        if part.ndim < n:
            raise ValueError(
                f"{op}: {label} must begin with {like}'s leading shape {tuple(lead)}, got {tuple(part.shape)}"
            )
        check_broadcast(op, label, part, (*lead, *part.shape[n:]), f"{like}'s leading shape and any other dimensions")


def check_condition_of_states(
    op: str, name: str, cond: Condition, lead: torch.Size, device: torch.device, like: str
) -> None:
    """The same for a condition that must not broadcast, because it has a state for each of the rows."""
    for label, part in _parts(op, name, cond, 0):
        check_tensors, form = (check_floating, "be (..., c) with") if part is cond else (check_dense, "begin with")
        check_tensors(op, device, **{label: part})
        if part.shape[: len(lead)] != lead or (part is cond and part.ndim == len(lead)):
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
