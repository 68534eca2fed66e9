"""Checks at the public boundary. Every message names the operator, the argument, what was wanted and what was given."""

from __future__ import annotations

import itertools
import math
import numbers
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST = sys.float_info.max
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_COUNT = 2**16
"""More steps or samples are treated as a mistake."""
MAX_NUMBER = 1e30
"""A larger option is treated as a mistake. float32 still holds this."""


def check_floating(op: str, device: torch.device | None = None, **tensors: Tensor) -> torch.device:
    """Check that all are dense floating-point tensors on one device, and return the device."""
    return _check_tensors(op, device, tensors, FLOATING)


def check_dense(op: str, device: torch.device | None = None, **tensors: Tensor) -> torch.device:
    """The same for tensors of any dtype."""
    return _check_tensors(op, device, tensors, None)


def _check_tensors(
    op: str, device: torch.device | None, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...] | None
) -> torch.device:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{op}: {name} must be a dense tensor, got one that is {_layout(tensor)}")
        if dtypes is not None and tensor.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: all tensors must be on one device, got {name} on {tensor.device} and {device}")
        device = tensor.device
    assert device is not None, "called without a tensor"
    return device


def _layout(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def check_choice(op: str, name: str, value: object, choices: Collection[str | None]) -> None:
    # not `in` alone, which gives an array for an array
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be True or False, got {brief(value)}")


def is_number(value: object) -> bool:
    """Whether this is a real number of Python or NumPy. A tensor is not: its value may be on another device."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, (bool, np.bool_))


def is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def as_float(value: Any) -> float:
    """The number as a float; NaN, which is in no interval, for anything else or a number larger than any float."""
    if type(value) is float:
        return value
    if not is_number(value):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def is_sequence(value: object) -> bool:
    """Whether this is a sequence, but not text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def check_at_least(op: str, name: str, value: float, least: float, *, exclusive: bool = False) -> float:
    """Check the number, and return it as a float."""
    if type(value) is not float and not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {brief(value)}")
    number = as_float(value)
    if not least <= number <= _LARGEST or (exclusive and number == least):
        raise ValueError(f"{op}: {name} must be finite and {'>' if exclusive else '>='} {least:g}, got {brief(value)}")
    if number > MAX_NUMBER:
        raise ValueError(f"{op}: {name} must be at most {MAX_NUMBER:g}, got {brief(value)}")
    return number


def check_count(op: str, name: str, value: int, least: int = 1, most: int = MAX_COUNT) -> int:
    """Check the count, and return it as Python's int, because NumPy's integers overflow."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {brief(value)}")
    if value > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {brief(value)}")
    return int(value)


def check_bounds(op: str, name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Check that this is a pair of numbers in order, and return floats."""
    if type(value) is tuple and len(value) == 2:  # the usual case first, which should cost nothing
        low, high = value
        if type(low) is float and type(high) is float and low <= high:
            return value
    pair = [as_float(bound) for bound in itertools.islice(value, 3)] if is_sequence(value) else []
    if len(pair) != 2 or not pair[0] <= pair[1]:
        raise ValueError(f"{op}: {name} must be None or (low, high) of floats with low <= high, got {brief(value)}")
    return pair[0], pair[1]


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], wants: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must be {wants} = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_broadcast(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], wants: str) -> None:
    """Check that ``tensor`` broadcasts to ``shape`` without enlarging it."""
    sizes = tensor.shape
    if len(sizes) > len(shape) or not all(a == b or a == 1 for a, b in zip(reversed(sizes), reversed(shape))):
        raise ValueError(f"{op}: {name} must broadcast to {wants} = {tuple(shape)}, got {tuple(sizes)}")


def brief(value: Any) -> str:
    """The given value, in one line that fits on a screen."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, int) and abs(value) > 10**20:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # of a user's class, or because the number has too many digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
