"""An action may have several dimensions, such as a chunk (horizon, d): its last ``event_dim`` dimensions are one event.

All operators take an event as one row of numbers. The public functions check it, flatten it, and shape the result.
"""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

from fdkernels.validation import check_count

MAX_EVENT_DIM = 16
"""More dimensions of one action are treated as a mistake."""
_Tensor = TypeVar("_Tensor", Tensor, "Tensor | None")


def check_event_dim(op: str, event_dim: int) -> int:
    if type(event_dim) is int and event_dim == 1:  # the usual case first, which should cost nothing
        return event_dim
    return check_count(op, "event_dim", event_dim, most=MAX_EVENT_DIM)


def check_event(op: str, name: str, tensor: Tensor, event_dim: int, least: int = 1) -> tuple[int, ...]:
    """The sizes of the tensor's last ``event_dim`` dimensions, each at least ``least``."""
    event = tuple(tensor.shape[-event_dim:])
    if len(event) < event_dim or min(event) < least:
        wants = f" with {sizes(event_dim)} of at least {least}" if least else ""
        raise ValueError(f"{op}: {name} must be (..., {form(event_dim)}){wants}, got {tuple(tensor.shape)}")
    return event


def check_samples(op: str, displacement: Tensor, name: str, samples: Tensor, event_dim: int) -> tuple[int, ...]:
    """Check that ``samples`` is (..., K, *event) with the displacement's leading shape and event; return the event."""
    event = check_event(op, "displacement", displacement, event_dim)
    lead = tuple(displacement.shape[:-event_dim])
    at_k = samples.ndim - event_dim - 1
    if at_k < 0 or samples.shape[:at_k] != lead or samples.shape[at_k + 1 :] != event or samples.shape[at_k] == 0:
        own = f"d={event[0]}" if event_dim == 1 else f"event {event}"
        raise ValueError(
            f"{op}: {name} must be (..., K, {form(event_dim)}) with K of at least 1, the displacement's {own} and its "
            f"leading shape {lead}, got {tuple(samples.shape)}"
        )
    return event


def form(event_dim: int) -> str:
    """How messages write the shape of an event."""
    return "d" if event_dim == 1 else f"*event of event_dim={event_dim} dimensions"


def sizes(event_dim: int) -> str:
    """How messages write the sizes of an event."""
    return "d" if event_dim == 1 else "sizes"


def flat(tensor: _Tensor, event_dim: int) -> _Tensor:
    """(..., *event) as (..., d), where d is the number of the event's elements."""
    if tensor is None or event_dim == 1:
        return tensor
    return tensor.reshape(*tensor.shape[:-event_dim], math.prod(tensor.shape[-event_dim:]))


def shaped(tensor: Tensor, *events: tuple[int, ...]) -> Tensor:
    """The reverse of :func:`flat` for each of the last dimensions: (..., d) as (..., *event)."""
    if all(len(event) == 1 for event in events):
        return tensor
    lead = tensor.shape[: tensor.ndim - len(events)]
    return tensor.reshape(*lead, *(size for event in events for size in event))
