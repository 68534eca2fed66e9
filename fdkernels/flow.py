"""Integrate the ODE of a flow policy, dx/dt = v(x, t, cond)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fdkernels.backend import Backend, choose_backend
from fdkernels.mlp import PackedMLP, VelocityMLP, pack_mlp
from fdkernels.validation import check_choice, check_count, check_floating

Method = Literal["euler", "midpoint", "heun", "rk4"]
Precision = Literal["highest", "high", "bf16"]
Velocity: TypeAlias = PackedMLP | nn.Module | Callable[[Tensor, Tensor, Tensor | None], Tensor]
_Field: TypeAlias = Callable[[Tensor, float | Tensor], Tensor]  # v(x, t) for a fixed condition


def integrate_flow(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    return_path: bool = False,
    precision: Precision | None = None,
    differentiable: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Transport noise to actions along a flow: x_{i+1} = x_i + h_i·v(x_i, t_i, cond) for Euler.

    For a :class:`VelocityMLP` or a packed MLP the condition's share of the first layer is computed once, not at
    every step, and nothing is concatenated.

    Args:
        velocity: a :class:`VelocityMLP`, the result of :func:`pack_mlp`, or any callable v(x, t, cond) -> (..., d)
            with x (..., d), t (..., 1) in x's dtype and cond as given.
        x0: where to start, (..., d), at the first time of the grid.
        cond: condition (..., c) with x0's leading shape, or None.
        num_steps: S; the grid is then i/S, i = 0 ... S.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` (order 2) or ``"rk4"`` (order 4).
        time_grid: S + 1 times of your own instead, in any direction: a sequence, or a 1-d tensor (read on the host).
        clip: bounds applied to the end of the path only; None never clips.
        return_path: return the states at all times, (S + 1, ..., d), the last one clipped.
        precision: None and ``"highest"``/``"high"``/``"bf16"`` choose the matrix precision of the fused kernels. The
            PyTorch path follows ``torch.set_float32_matmul_precision`` and autocast, and takes None only.
        differentiable: by default the solver runs without gradient, since the method never needs one. True lets
            autograd through to x0, cond and the weights.
        backend: ``None`` picks by device; ``"torch"`` or ``"triton"`` insist.

    Returns:
        (..., d), or (S + 1, ..., d) with ``return_path``, in x0's dtype.

    Raises:
        TypeError: x0 or cond is not a floating-point tensor, velocity is not callable.
        ValueError: shapes do not fit, devices differ, or an option is out of its range.

    Example:
        >>> import torch, fdkernels
        >>> decay = lambda x, t, cond: -x
        >>> fdkernels.integrate_flow(decay, torch.ones(1, 1), num_steps=100, method="rk4")  # 1/e
        tensor([[0.3679]])
    """
    op = "integrate_flow"
    check_floating(op, x0=x0, cond=cond)
    if x0.ndim == 0:
        raise ValueError(f"{op}: x0 must be (..., d), got a scalar")
    if cond is not None and cond.shape[:-1] != x0.shape[:-1]:
        raise ValueError(
            f"{op}: cond must be (..., c) with x0's leading shape {tuple(x0.shape[:-1])}, got {tuple(cond.shape)}"
        )
    check_choice(op, "method", method, STEPS)
    check_clip(op, clip)
    choose_backend(op, backend)
    check_precision(op, precision)
    times = check_time_grid(op, num_steps, time_grid)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        field = velocity_field(op, velocity, x0, cond)
        return integrate(field, x0, times, method, clip, return_path)


def integrate(
    field: _Field,
    x: Tensor,
    times: Sequence[float],
    method: Method,
    clip: tuple[float, float] | None,
    return_path: bool = False,
) -> Tensor:
    """The loop, on checked arguments."""
    step = STEPS[method]
    path = [x]
    for t, next_t in itertools.pairwise(times):
        x = step(field, x, t, next_t - t)
        if return_path:
            path.append(x)
    if clip is not None:
        x = x.clamp(*clip)
    if return_path:
        return torch.stack([*path[:-1], x])
    return x


def _euler(v: _Field, x: Tensor, t: float, h: float) -> Tensor:
    return torch.add(x, v(x, t), alpha=h)


def _midpoint(v: _Field, x: Tensor, t: float, h: float) -> Tensor:
    middle = torch.add(x, v(x, t), alpha=0.5 * h)
    return torch.add(x, v(middle, t + 0.5 * h), alpha=h)


def _heun(v: _Field, x: Tensor, t: float, h: float) -> Tensor:
    start = v(x, t)
    end = v(torch.add(x, start, alpha=h), t + h)
    return torch.add(x, start + end, alpha=0.5 * h)


def _rk4(v: _Field, x: Tensor, t: float, h: float) -> Tensor:
    k1 = v(x, t)
    k2 = v(torch.add(x, k1, alpha=0.5 * h), t + 0.5 * h)
    k3 = v(torch.add(x, k2, alpha=0.5 * h), t + 0.5 * h)
    k4 = v(torch.add(x, k3, alpha=h), t + h)
    return torch.add(x, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)


STEPS: dict[str, Callable[[_Field, Tensor, float, float], Tensor]] = {
    "euler": _euler,
    "midpoint": _midpoint,
    "heun": _heun,
    "rk4": _rk4,
}


def velocity_field(
    op: str, velocity: Velocity, x: Tensor, cond: Tensor | None
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """v(x, t) for a fixed condition and a time that is a number or a tensor (..., 1)."""
    if isinstance(velocity, VelocityMLP) and type(velocity).forward is VelocityMLP.forward:
        velocity = pack_mlp(velocity)
    if isinstance(velocity, PackedMLP):
        check_widths(op, velocity, x, cond)
        return velocity.with_cond(cond)
    if not callable(velocity):
        raise TypeError(
            f"{op}: velocity must be a VelocityMLP, a packed MLP or a callable v(x, t, cond), "
            f"got {type(velocity).__name__}"
        )
    general = velocity

    def field(x: Tensor, t: float | Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=x.dtype, device=x.device)
        v = general(x, t.expand(*x.shape[:-1], 1), cond)
        if v.shape != x.shape:
            raise ValueError(f"{op}: velocity must return x's shape {tuple(x.shape)}, got {tuple(v.shape)}")
        return v

    return field


def check_widths(op: str, mlp: PackedMLP, x: Tensor, cond: Tensor | None) -> None:
    if x.shape[-1] != mlp.action_dim:
        raise ValueError(f"{op}: velocity moves {mlp.action_dim} dimensions, got points with d={x.shape[-1]}")
    dtype = mlp.layers[0].linear.weight.dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{op}: velocity's weights are {dtype}, got noise of {x.dtype}; convert one, or use autocast")
    given = 0 if cond is None else cond.shape[-1]
    if given != mlp.cond_dim:
        raise ValueError(f"{op}: velocity wants a condition of width {mlp.cond_dim}, got cond of width {given}")


def check_time_grid(op: str, num_steps: int, time_grid: Sequence[float] | Tensor | None) -> list[float]:
    if time_grid is None:
        check_count(op, "num_steps", num_steps)
        return [i / num_steps for i in range(num_steps + 1)]
    grid = torch.as_tensor(time_grid, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or not grid.isfinite().all():
        raise ValueError(f"{op}: time_grid must hold two or more finite times, got {time_grid!r}")
    return grid.tolist()


def check_clip(op: str, clip: tuple[float, float] | None) -> None:
    if clip is not None and not (len(clip) == 2 and clip[0] <= clip[1]):
        raise ValueError(f"{op}: clip must be None or (low, high) with low <= high, got {clip!r}")


def check_precision(op: str, precision: Precision | None) -> None:
    check_choice(op, "precision", precision, (None, "highest", "high", "bf16"))  # type: ignore[arg-type]
    if precision is not None:
        raise RuntimeError(
            f"{op}: precision={precision!r} chooses between fused kernels, which this version does not have; use "
            "precision=None with torch.set_float32_matmul_precision or autocast"
        )
