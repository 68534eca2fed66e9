"""Checks at the public boundary. Every message names the operator, the argument, what it got and what it wants."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(op: str, device: torch.device | None = None, **tensors: Tensor | None) -> torch.device:
    """All given tensors are floating point and on one device, which is returned."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: all tensors must be on one device, got {name} on {tensor.device} and {device}")
        device = tensor.device
    assert device is not None, "called without a tensor"
    return device


def check_choice(op: str, name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_at_least(op: str, name: str, value: float, least: float, *, exclusive: bool = False) -> None:
    if not least <= value < math.inf or (exclusive and value == least):  # NaN is in no interval
        raise ValueError(f"{op}: {name} must be finite and {'>' if exclusive else '>='} {least:g}, got {value!r}")


def check_count(op: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} must be an integer of at least 1, got {value!r}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], wants: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must be {wants} = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_broadcast(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], wants: str) -> None:
    """``tensor`` broadcasts to ``shape`` without enlarging it."""
    sizes = tensor.shape
    if len(sizes) > len(shape) or not all(a == b or a == 1 for a, b in zip(reversed(sizes), reversed(shape))):
        raise ValueError(f"{op}: {name} must broadcast to {wants} = {tuple(shape)}, got {tuple(sizes)}")
