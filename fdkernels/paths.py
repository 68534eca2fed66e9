"""Affine probability paths x_t = α_t·a + σ_t·x0 between noise x0 and data a."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fdkernels.torch_private import constant_when_compiled
from fdkernels.validation import FLOATING, brief

Time = TypeVar("Time", float, Tensor)
PathName = Literal["linear", "linear_reversed", "vp", "cosine"]
FUNCTIONS = ("alpha", "sigma", "d_alpha", "d_sigma")


@dataclasses.dataclass(frozen=True)
class AffinePath:
    """x_t = α_t·a + σ_t·x0, with the velocity field v(x, t) = E[α̇_t·a + σ̇_t·x0 | x_t = x].

    Attributes:
        alpha, sigma: coefficients of data and noise: functions of a tensor of times (...,) that keep its shape.
        d_alpha, d_sigma: their time derivatives.

    Using a path raises a TypeError if a coefficient is not a function, or does not return floating-point numbers.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]

    def at(self, op: str, t: Time) -> tuple[Time, Time, Time, Time]:
        """α, σ, α̇ and σ̇ at a time, or at a tensor of times."""
        path: Any = self
        found = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        if isinstance(t, Tensor):
            for name, value in zip(FUNCTIONS, found):
                if not isinstance(value, Tensor) or value.layout != torch.strided or value.shape != t.shape:
                    raise TypeError(f"{op}: path.{name} must give a tensor of its times' shape {tuple(t.shape)}")
                anywhere = t.ndim == 0 and value.device.type != "meta"  # a single number goes with any device
                elsewhere = value.device != t.device and not anywhere
                if value.dtype not in FLOATING or elsewhere:
                    raise TypeError(
                        f"{op}: path.{name} must give floating-point numbers on {t.device}, got {value.dtype} on "
                        f"{value.device}"
                    )
        return found


# The built-in paths also take a Python float and return one, so that a constant time needs no tensor. For a number that
# changes from call to call, a compiler knows powers, sin, cos and tanh, but neither exp nor expm1.
def _exp(t: Time) -> Time:
    return torch.exp(t) if isinstance(t, Tensor) else math.e**t


def _tanh(t: Time) -> Time:
    return torch.tanh(t) if isinstance(t, Tensor) else math.tanh(t)


def _sin(t: Time) -> Time:
    return torch.sin(t) if isinstance(t, Tensor) else math.sin(t)


def _cos(t: Time) -> Time:
    return torch.cos(t) if isinstance(t, Tensor) else math.cos(t)


# β rises from 0.1 to 20: Ho et al., 2020, in the continuous form of Song et al., 2021. The numbers have no names,
# because with dynamic shapes a compiler takes a global number for one that may change.
def _vp_log_alpha(t: Time) -> Time:
    s = 1 - t
    return -0.25 * s * s * (20.0 - 0.1) - 0.5 * s * 0.1


def _vp_alpha(t: Time) -> Time:
    return _exp(_vp_log_alpha(t))


def _vp_sigma(t: Time) -> Time:
    # 1 − α² cancels near t = 1; with u = tanh(−log α) it is 2u / (1 + u)
    u = _tanh(-_vp_log_alpha(t))
    return (2 * u / (1 + u)) ** 0.5


def _vp_d_alpha(t: Time) -> Time:
    return 0.5 * ((1 - t) * (20.0 - 0.1) + 0.1) * _vp_alpha(t)


def _vp_d_sigma(t: Time) -> Time:
    return -_vp_alpha(t) * _vp_d_alpha(t) / _vp_sigma(t)


PATHS: dict[str, AffinePath] = {
    "linear": AffinePath(lambda t: t, lambda t: 1 - t, lambda t: 0 * t + 1, lambda t: 0 * t - 1),
    "linear_reversed": AffinePath(lambda t: 1 - t, lambda t: t, lambda t: 0 * t - 1, lambda t: 0 * t + 1),
    "vp": AffinePath(_vp_alpha, _vp_sigma, _vp_d_alpha, _vp_d_sigma),
    "cosine": AffinePath(
        lambda t: _sin(0.5 * math.pi * t),
        lambda t: _cos(0.5 * math.pi * t),
        lambda t: 0.5 * math.pi * _cos(0.5 * math.pi * t),
        lambda t: -0.5 * math.pi * _sin(0.5 * math.pi * t),
    ),
}
"""The built-in paths by the names that ``path`` takes."""


def levels(op: str, path: AffinePath, t: float, device: torch.device) -> tuple[Any, Any]:
    """α_t and σ_t: numbers on a built-in path, or else tensors without dimensions, which the host does not read."""
    if takes_numbers(path):
        return _numbers(path, t)
    alpha, sigma, _, _ = path.at(op, torch.full((), t, dtype=torch.float64, device=device))
    return alpha, sigma


def check_noise_left(op: str, path: AffinePath, t: float, what: str) -> None:
    """Check that σ_t > 0. Of other than built-in paths this reads a tensor, which a compiled program does not."""
    if takes_numbers(path):
        _, sigma = _numbers(path, t)
    elif torch.compiler.is_compiling():
        return
    else:
        _, sigma = levels(op, path, t, torch.device("cpu"))
    if not sigma > 0:
        raise ValueError(f"{op}: t must leave some noise (σ_t > 0) for a {what} to exist, got t={t!r} with σ_t = 0")


def _numbers(path: AffinePath, t: float) -> tuple[float, float]:
    """α_t and σ_t of a built-in path."""
    return (t, 1 - t) if path is PATHS["linear"] else (path.alpha(t), path.sigma(t))  # type: ignore[arg-type, return-value]


@constant_when_compiled
def _read_ends(op: str, path: AffinePath) -> list[float]:
    """α and σ at 0, then at 1, of other than built-in paths."""
    return [float(level.detach()) for t in (0.0, 1.0) for level in levels(op, path, t, torch.device("cpu"))]


def data_time(op: str, path: AffinePath) -> float:
    """The data's end of the path, 1 or 0: the one with less noise. The other is the noise's."""
    if takes_numbers(path):  # known, for a compiler with dynamic shapes could not follow how it is found
        return 0.0 if path is PATHS["linear_reversed"] else 1.0
    if torch.compiler.is_compiling():  # for the guards on what the functions read: a constant has none
        levels(op, path, 0.0, torch.device("cpu"))
    alpha_0, sigma_0, alpha_1, sigma_1 = _read_ends(op, path)
    at_0, at_1 = abs(sigma_0 * alpha_1), abs(sigma_1 * alpha_0)
    if at_0 == at_1 or math.isnan(at_0) or math.isnan(at_1):
        raise ValueError(
            f"{op}: path must run between noise and data for t and time_grid to have defaults, got α={alpha_0:g} and "
            f"σ={sigma_0:g} at t=0, α={alpha_1:g} and σ={sigma_1:g} at t=1"
        )
    return 1.0 if at_0 > at_1 else 0.0


def near_data(op: str, path: AffinePath, distance: float) -> float:
    """The time that far from the data's end of the path."""
    return abs(data_time(op, path) - distance)


def takes_numbers(path: AffinePath) -> bool:
    """Whether the path is built in. (PyTorch 2.7 cannot compile ``in`` for the values of a dict.)"""
    return path is PATHS["linear"] or any(path is known for known in PATHS.values())


def resolve_path(op: str, path: PathName | AffinePath) -> AffinePath:
    """The built-in path of this name, or the given path, checked."""
    if isinstance(path, str) and path in PATHS:
        return PATHS[path]
    if not isinstance(path, AffinePath):
        raise ValueError(f"{op}: path must be an AffinePath or one of {', '.join(map(repr, PATHS))}, got {brief(path)}")
    for name in FUNCTIONS:
        function = getattr(path, name)
        if not callable(function):
            raise TypeError(f"{op}: path.{name} must be a function, got {type(function).__name__}")
    return path
