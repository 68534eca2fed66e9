"""From noise to action: the flow's ordinary differential equation dx/dt = v(x, t, s), solved by explicit steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdkernels_ref.paths import AffinePath, data_time

Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # v(x, t, cond): x (..., d), t (..., 1), cond as given -> (..., d)
Field = Callable[[Tensor, float], Tensor]  # the same with cond fixed and t a number


def _euler(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * v(x, t)


def _midpoint(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def _heun(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    k1 = v(x, t)
    k2 = v(x + h * k1, t + h)
    return x + h / 2 * (k1 + k2)


def _rk4(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, t + h / 2)
    k3 = v(x + h / 2 * k2, t + h / 2)
    k4 = v(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


_METHODS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}


def integrate_flow(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    path: str | AffinePath = "linear",
    num_steps: int = 10,
    method: str = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    return_path: bool = False,
) -> Tensor:
    """The behaviour action a = clip(x_S), where x_{i+1} = x_i + h_i·v(x_i, t_i, s) and h_i = t_{i+1} − t_i.

    This is the paper's sampler, "euler" with t_i = i/S and S = 10. "midpoint" and "heun" (both of order 2) and "rk4"
    (order 4) are the textbook Runge-Kutta methods.

    Args:
        velocity: any v(x, t, cond) -> (..., d); t has shape (..., 1) and the dtype of x0, cond is passed on as given.
        x0: noise, (..., d).
        cond: the state s, (..., c).
        path: as in `velocity_to_score`; where its data are at t = 0, the times run backwards.
        num_steps: S.
        method: "euler", "midpoint", "heun" or "rk4".
        time_grid: the S + 1 times t_i in place of these, rising or falling; `num_steps` is then ignored.
        clip: lower and upper bound of a, or None for no clipping.
        clip_each_step: clip after every step, not only the last.
        return_path: return every x_i instead of a alone.

    Returns:
        a, (..., d), in the dtype of x0; with `return_path` x_0 to x_S, (S + 1, ..., d), the last one clipped.
        Differentiable in x0, cond and the velocity's parameters, through every step.
    """
    if time_grid is None:
        times = [i / num_steps for i in range(num_steps + 1)]
        times = times if data_time(path) == 1 else times[::-1]
    else:
        times = [float(t) for t in time_grid]

    def field(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full_like(x[..., :1], t), cond)

    states = [x0]
    for t, t_next in itertools.pairwise(times):
        states.append(_METHODS[method](field, states[-1], t, t_next - t))
        if clip is not None and (clip_each_step or len(states) == len(times)):
            states[-1] = states[-1].clamp(*clip)
    return torch.stack(states) if return_path else states[-1]
