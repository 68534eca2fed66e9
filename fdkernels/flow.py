"""Integrate the ODE of a flow policy, dx/dt = v(x, t, cond)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fdkernels import cpu_field, groups, processor
from fdkernels.backend import Backend, float32_products
from fdkernels.fused import Implementation, choose_fused, fused_integrate, fused_integrate_groups
from fdkernels.mlp import PackedMLP, VelocityMLP, pack_mlp
from fdkernels.solvers import METHODS, Field, Method, check_time_grid, integrate
from fdkernels.validation import check_broadcast, check_choice, check_floating

Precision = Literal["highest", "high", "bf16"]
Velocity: TypeAlias = PackedMLP | nn.Module | Callable[[Tensor, Tensor, Tensor | None], Tensor]


def integrate_flow(
    velocity: Velocity,
    x0: Tensor,
    cond: Tensor | None = None,
    *,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    return_path: bool = False,
    differentiable: bool = False,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    r"""Transport noise to actions along a flow: x_{i+1} = x_i + h_i·v(x_i, t_i, cond) for Euler.

    **No gradient runs through the solver unless** ``differentiable=True``: the Fisher decorator never needs one, and
    the result is a constant to autograd.

    For a :class:`VelocityMLP` or a packed MLP the condition's share of the first layer is computed once for each row
    of ``cond``, not at every step, and nothing is concatenated. On CUDA the whole solve is one launch, or one CUDA
    graph where there are many rows. On a CPU it goes the way that suits the processor (``processor.py``).

    Args:
        velocity: a :class:`VelocityMLP`, the result of :func:`pack_mlp`, or any callable v(x, t, cond) -> (..., d)
            with x (..., d), t (..., 1) in x's dtype and cond (..., c), expanded to x's leading shape.
        x0: where to start, (..., d), at the first time of the grid.
        cond: condition (..., c), or None. Its leading shape broadcasts to x0's: with (B, 1, c) against (B, K, d) one
            state serves K samples.
        num_steps: S; the grid is then i/S, i = 0 ... S.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` (order 2) or ``"rk4"`` (order 4).
        time_grid: S + 1 times of your own instead, in any direction: a sequence, or a 1-d tensor (read on the host).
        clip: bounds applied to the end of the path; None never clips.
        clip_each_step: apply them after every step. Nothing to do with the inner stages of a step.
        return_path: return the states at all times, (S + 1, ..., d), as stepped and clipped; x0 first, untouched.
        differentiable: let autograd through to x0, cond and the weights, where gradients are enabled. Each step is
            checkpointed: with the number of steps memory grows by the state x alone (and 5 kB, the state of the random
            generator), and the backward pass computes every step again. Weights must not change in between.
        precision: of the matrix products. ``None`` takes bfloat16 or float16 under autocast, the weights' own dtype
            otherwise, float32 as ``torch.set_float32_matmul_precision`` says. ``"bf16"`` takes bfloat16 for the hidden
            layers of a packed MLP; state, first layer and norms stay float32 (on CUDA the first layer's products are
            TF32, the last layer's bfloat16; on the CPU both are float32). ``"highest"`` and
            ``"high"`` take float32, whatever autocast says; they differ on CUDA only (float32-accurate and TF32). A
            callable runs under autocast for ``"bf16"``, and without it for the other two.
        backend: ``None`` picks by device; ``"torch"`` or ``"triton"`` insist.
        implementation: how the kernels get at the weights, picked by a table from rows, widths, precision and GPU
            unless given. ``"stationary"``: groups of programs hold them on the chip for the whole solve; for few rows,
            and hidden layers of one width, a power of two, without layer norm. ``"streamed"``: every program reads all
            of them at every evaluation; any network. ``"gemm"``: cuBLAS multiplies, layer by layer; for many rows. Its
            launches are recorded as a CUDA graph at the second call with the same shapes and weights, on the default
            stream, and replayed from then on; elsewhere they become part of the graph that the caller captures.
            Float32 products follow ``torch.set_float32_matmul_precision`` there. ``python -m fdkernels.tune``
            measures the table.

    Returns:
        (..., d), or (S + 1, ..., d) with ``return_path``, in x0's dtype. The state of a packed MLP in half precision
        is float32 on the way.

    Raises:
        TypeError: x0 or cond is not a floating-point tensor, velocity is not callable.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, or ``"high"`` or
            ``"bf16"`` is asked of float64.
        RuntimeError: the backend or the precision asked for cannot be had here.

    Example:
        >>> import torch, fdkernels
        >>> decay = lambda x, t, cond: -x
        >>> fdkernels.integrate_flow(decay, torch.ones(1, 1), num_steps=100, method="rk4")  # 1/e
        tensor([[0.3679]])
    """
    op = "integrate_flow"
    check_start(op, x0, cond, "x0", "cond")
    check_solver(op, method, clip, clip_each_step)
    check_precision(op, precision)
    times = check_time_grid(op, num_steps, time_grid)
    velocity = as_velocity(op, velocity)
    if choose_fused(op, backend, implementation, velocity, (x0,), differentiable):
        assert isinstance(velocity, PackedMLP)
        check_rows(op, velocity, x0, cond, "x0", "cond", not torch.is_autocast_enabled(x0.device.type))
        return fused_integrate(
            velocity, x0, cond, times, method, clip, clip_each_step, return_path, precision, implementation
        )
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        flow, context = bind_flow(op, velocity, x0, precision)
        with context:
            field, x = flow(x0, cond, "x0", "cond")
            return integrate(field, x, times, method, clip, clip_each_step, return_path).to(x0.dtype)


def integrate_flow_groups(
    velocity: Velocity,
    x0s: Sequence[Tensor],
    conds: Sequence[Tensor | None],
    *,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    differentiable: bool = False,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> tuple[Tensor, ...]:
    """Several groups of rows along the flow of the same weights: :func:`integrate_flow` of each, in one call.

    One update of an agent needs next actions (B, d), base actions (B, d) and Fisher samples (B, K, d), the last with
    one condition (B, 1, c) for K samples. The kernels take all rows at once, and so does the CPU where
    nobody differentiates; elsewhere the groups run one after another.

    Args:
        velocity: as in :func:`integrate_flow`.
        x0s: where to start, one tensor (..., d) for each group; leading shapes may differ, device and dtype may not.
        conds: as many conditions (..., c), each broadcasting to its group's leading shape, or None.
        num_steps, method, time_grid, clip, clip_each_step, differentiable, precision, backend, implementation: as in
            :func:`integrate_flow`, for all groups.

    Returns:
        The ends, one (..., d) for each group: what separate calls give, up to rounding.

    Raises:
        As :func:`integrate_flow`; the message names the group.

    Example:
        >>> import torch, fdkernels
        >>> flow, obs = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32)), torch.randn(8, 17)
        >>> noises, obs_of = [torch.randn(8, 6), torch.randn(8, 4, 6)], [obs, obs.unsqueeze(1)]
        >>> [tuple(action.shape) for action in fdkernels.integrate_flow_groups(flow, noises, obs_of)]
        [(8, 6), (8, 4, 6)]
    """
    op = "integrate_flow_groups"
    if isinstance(x0s, Tensor) or isinstance(conds, Tensor) or len(x0s) != len(conds):
        raise ValueError(f"{op}: x0s and conds must be sequences of one length, one entry for each group of rows")
    for i, (x0, cond) in enumerate(zip(x0s, conds)):
        check_start(op, x0, cond, f"x0s[{i}]", f"conds[{i}]")
        if (x0.dtype, x0.device) != (x0s[0].dtype, x0s[0].device):
            raise ValueError(
                f"{op}: all groups must have one dtype and device, got x0s[{i}] of {x0.dtype} on {x0.device} and "
                f"x0s[0] of {x0s[0].dtype} on {x0s[0].device}"
            )
    check_solver(op, method, clip, clip_each_step)
    check_precision(op, precision)
    times = check_time_grid(op, num_steps, time_grid)
    if not x0s:
        return ()
    velocity = as_velocity(op, velocity)
    strict = not torch.is_autocast_enabled(x0s[0].device.type)
    fused = choose_fused(op, backend, implementation, velocity, x0s, differentiable)
    if isinstance(velocity, PackedMLP):
        for i, (x0, cond) in enumerate(zip(x0s, conds)):
            check_rows(op, velocity, x0, cond, f"x0s[{i}]", f"conds[{i}]", strict)
    if fused:
        assert isinstance(velocity, PackedMLP)
        return fused_integrate_groups(
            velocity, x0s, conds, times, method, clip, clip_each_step, False, precision, implementation
        )
    apart = []
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        flow, context = bind_flow(op, velocity, x0s[0], precision)
        with context:
            if isinstance(velocity, PackedMLP) and cpu_field.serves(x0s[0]):
                field, x = flow(*groups.join(x0s, conds), "x0s", "conds")
                ends = integrate(field, x, times, method, clip, clip_each_step)
                return groups.split(ends.to(x0s[0].dtype), x0s)
            for i, (x0, cond) in enumerate(zip(x0s, conds)):
                field, x = flow(x0, cond, f"x0s[{i}]", f"conds[{i}]")
                apart.append(integrate(field, x, times, method, clip, clip_each_step).to(x0.dtype))
    return tuple(apart)


Flow: TypeAlias = Callable[[Tensor, "Tensor | None", str, str], "tuple[Field, Tensor]"]
"""Velocity and weights as they stand for one call: from x0, cond and their names to v(x, t) and x0 as it is carried."""


def as_velocity(op: str, velocity: Velocity) -> PackedMLP | Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A :class:`VelocityMLP` packed, everything else as it is."""
    if isinstance(velocity, VelocityMLP) and type(velocity).forward is VelocityMLP.forward:
        return pack_mlp(velocity)
    if not callable(velocity):
        raise TypeError(
            f"{op}: velocity must be a VelocityMLP, a packed MLP or a callable v(x, t, cond), "
            f"got {type(velocity).__name__}"
        )
    return velocity


def bind_flow(
    op: str,
    velocity: PackedMLP | Callable[[Tensor, Tensor, Tensor | None], Tensor],
    like: Tensor,
    precision: Precision | None,
) -> tuple[Flow, contextlib.AbstractContextManager]:
    """The flow from starts of ``like``'s dtype and device on the PyTorch path, and the context in which it runs."""
    dtype = velocity.dtype if isinstance(velocity, PackedMLP) else like.dtype
    if precision in ("high", "bf16") and torch.float64 in (dtype, like.dtype):
        raise ValueError(f"{op}: precision={precision!r} is less than float64 tensors have; use None or 'highest'")
    if precision in ("highest", "high"):
        _check_float32_products(op, precision, like.device)
    device = like.device.type
    autocast = torch.is_autocast_enabled(device)
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if isinstance(velocity, PackedMLP):
        hidden = {None: dtype, "bf16": torch.bfloat16}.get(precision, torch.promote_types(dtype, torch.float32))
        if autocast:
            if precision is None and dtype != torch.float64:
                hidden = torch.get_autocast_dtype(device)
            context = torch.autocast(device, enabled=False)  # the dtypes are settled
        return _bind_mlp(op, velocity, hidden, strict=not autocast), context
    if precision == "bf16":
        context = torch.autocast(device, dtype=torch.bfloat16)
    elif precision is not None and autocast:
        context = torch.autocast(device, enabled=False)
    return _bind_callable(op, velocity), context


def _check_float32_products(op: str, precision: str, device: torch.device) -> None:
    """PyTorch's float32 products follow one global setting, which is the caller's and is not touched here."""
    setting = float32_products()
    if setting == "medium" or (device.type == "cuda" and setting != precision):
        raise RuntimeError(
            f"{op}: precision={precision!r} on the PyTorch path needs torch.set_float32_matmul_precision({precision!r})"
            f", got {setting!r}"
        )


def _bind_mlp(op: str, mlp: PackedMLP, hidden: torch.dtype, *, strict: bool) -> Flow:
    outer = torch.promote_types(mlp.dtype, torch.float32)
    emulated = mlp.layers[0].linear.weight.device.type == "cpu" and not processor.multiplies(hidden)
    tensors = mlp.read(outer, hidden, torch.float32 if emulated else None)

    def flow(x0: Tensor, cond: Tensor | None, x0_name: str, cond_name: str) -> tuple[Field, Tensor]:
        check_rows(op, mlp, x0, cond, x0_name, cond_name, strict)
        x = x0.to(outer)
        if cpu_field.serves(x):
            return cpu_field.CpuField(tensors, cond, x.shape[:-1]), x
        return tensors.field(cond), x

    return flow


def check_rows(
    op: str, mlp: PackedMLP, x: Tensor, cond: Tensor | None, x_name: str, cond_name: str, strict: bool
) -> None:
    """x and cond have the widths that the network wants, and where ``strict`` the dtype of its weights."""
    if x.shape[-1] != mlp.action_dim:
        raise ValueError(f"{op}: velocity moves {mlp.action_dim} dimensions, got {x_name} with d={x.shape[-1]}")
    device = mlp.layers[0].linear.weight.device
    if x.device != device:
        raise ValueError(f"{op}: velocity's weights are on {device}, got {x_name} on {x.device}")
    given = 0 if cond is None else cond.shape[-1]
    if given != mlp.cond_dim:
        raise ValueError(f"{op}: velocity wants a condition of width {mlp.cond_dim}, got {cond_name} of width {given}")
    for name, tensor in ((x_name, x), (cond_name, cond)):
        if strict and tensor is not None and tensor.dtype != mlp.dtype:
            raise ValueError(
                f"{op}: velocity's weights are {mlp.dtype}, got {name} of {tensor.dtype}; convert one, or use autocast"
            )


def _bind_callable(op: str, velocity: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Flow:
    def flow(x0: Tensor, cond: Tensor | None, x0_name: str, cond_name: str) -> tuple[Field, Tensor]:
        lead = x0.shape[:-1]
        spread = cond if cond is None or cond.shape[:-1] == lead else cond.expand(*lead, cond.shape[-1])

        def field(x: Tensor, t: float | Tensor) -> Tensor:
            if not isinstance(t, Tensor):
                t = torch.full((), t, dtype=x.dtype, device=x.device)
            v = velocity(x, t.expand(*lead, 1), spread)
            if v.shape != x.shape:
                raise ValueError(f"{op}: velocity must return x's shape {tuple(x.shape)}, got {tuple(v.shape)}")
            return v.to(x.dtype)

        return field, x0

    return flow


def check_start(op: str, x0: Tensor, cond: Tensor | None, x0_name: str, cond_name: str) -> None:
    """x0 is (..., d), and cond (..., c) has a leading shape that broadcasts to x0's."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"{op}: {x0_name} must be a torch.Tensor, got {type(x0).__name__}")
    check_floating(op, None, **{x0_name: x0, cond_name: cond})
    if x0.ndim == 0:
        raise ValueError(f"{op}: {x0_name} must be (..., d), got a scalar")
    if cond is None:
        return
    if cond.ndim == 0:
        raise ValueError(f"{op}: {cond_name} must be (..., c), got a scalar")
    shape = (*x0.shape[:-1], cond.shape[-1])
    check_broadcast(op, cond_name, cond, shape, f"(..., c) with {x0_name}'s leading shape")


def check_solver(op: str, method: Method, clip: tuple[float, float] | None, clip_each_step: bool) -> None:
    check_choice(op, "method", method, METHODS)
    if clip is None and clip_each_step:
        raise ValueError(f"{op}: clip_each_step needs bounds, got clip=None")
    if clip is not None and not (len(clip) == 2 and clip[0] <= clip[1]):
        raise ValueError(f"{op}: clip must be None or (low, high) with low <= high, got {clip!r}")


def check_precision(op: str, precision: Precision | None) -> None:
    check_choice(op, "precision", precision, (None, "highest", "high", "bf16"))  # type: ignore[arg-type]
