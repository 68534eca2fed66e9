"""A velocity given by the user, bound to the dtypes and the precision of one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fdkernels.backend import (
    HALF,
    Precision,
    autocast,
    autocast_enabled,
    check_float32_products,
    check_precision,
    settle_precision,
)
from fdkernels.condition import Condition, check_condition, each, joined, spread
from fdkernels.cpu import field as cpu_field
from fdkernels.cpu import processor
from fdkernels.events import check_event
from fdkernels.layers import EncodedNetwork, Network, encode
from fdkernels.networks import PackedMLP
from fdkernels.packing import is_known, pack_known
from fdkernels.records import Way
from fdkernels.solvers import Field
from fdkernels.torch_private import transforms_active
from fdkernels.validation import brief, check_floating

Velocity: TypeAlias = PackedMLP | nn.Module | Callable[[Tensor, Tensor, Any], Tensor]
Flow: TypeAlias = Callable[[Tensor, Any], "tuple[Field, Tensor]"]
"""Maps checked rows x0 and their condition to v(x, t) and x0 in the dtype of the solver's state."""


class BoundVelocity(NamedTuple):
    """A velocity, and the precision of one call."""

    op: str
    velocity: Any
    """v(x, t, cond)."""
    packed: PackedMLP | None
    """The velocity if it is an MLP whose layers are known, otherwise None."""
    asked: Precision | None
    """The precision that the caller asks for."""
    settled: str
    """The precision that results: "highest", "high", "bf16" or "fp16"."""
    autocast: bool
    event: tuple[int, ...]
    """The shape of one action. Rows hold its elements in one dimension."""

    def way(self, implementation: str | None) -> Way:
        """How the kernels integrate."""
        return Way(self.settled, implementation)

    def encoded(self) -> EncodedNetwork:
        """The MLP in the form that the kernels take."""
        assert self.packed is not None
        return encode([layer.read() for layer in self.packed.layers], self.packed.order)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context in which PyTorch integrates."""
        check_float32_products(self.op, self.asked, device)
        if self.autocast and (self.packed is not None or self.asked in ("highest", "high")):
            return autocast(device, None)  # an MLP's dtypes are settled
        if self.packed is None and self.asked == "bf16":
            return autocast(device, torch.bfloat16)
        return contextlib.nullcontext()

    def flow(self) -> Flow:
        """The flow on the PyTorch path, with the weights as they are now."""
        return self._flow_of_callable() if self.packed is None else self._flow_of_mlp(self.packed)

    def tangent_field(self, x0: Tensor, cond: Condition) -> tuple[Tensor, Field]:
        """x0 in the dtype of the solver's state, and the field of rows and their tangents, without gradients.

        Both have shape (1 + d, ..., d); the field is v(x, t) of the first row, and ∂v/∂x times each other one.
        """
        if self.packed is None:
            return x0, self._tangent_field_of_callable(x0, cond)
        assert cond is None or isinstance(cond, Tensor), "check_rows checks this"
        network = self._network(self.packed)
        return x0.to(torch.promote_types(self.packed.dtype, torch.float32)), network.tangent_field(cond)

    def _network(self, packed: PackedMLP) -> Network:
        """The weights as they are now, in the dtypes of this call."""
        outer = torch.promote_types(packed.dtype, torch.float32)
        hidden = HALF.get(self.settled, outer)
        emulated = packed.device.type == "cpu" and not processor.multiplies(hidden)
        return packed.read(outer, hidden, torch.float32 if emulated else None)

    def _flow_of_mlp(self, packed: PackedMLP) -> Flow:
        network, outer = self._network(packed), torch.promote_types(packed.dtype, torch.float32)

        def flow(x0: Tensor, cond: Tensor | None) -> tuple[Field, Tensor]:
            x = x0.to(outer)
            if cpu_field.serves(x):
                return cpu_field.CpuField(network, cond, x.shape[:-1]), x
            return network.field(cond), x

        return flow

    def _flow_of_callable(self) -> Flow:
        op, velocity, event = self.op, self.velocity, self.event
        of_chunks = len(event) > 1

        def flow(x0: Tensor, cond: Condition) -> tuple[Field, Tensor]:
            lead = x0.shape[:-1]
            given, shape = spread(cond, lead), tuple(x0.shape)
            if of_chunks:
                given, shape = joined(given, lead), (lead.numel(), *event)

            def field(x: Tensor, t: float | Tensor) -> Tensor:
                if not isinstance(t, Tensor):
                    t = torch.full((), t, dtype=x.dtype, device=x.device)
                z, t = x, t.expand(*lead, 1)
                if of_chunks:
                    z, t = x.reshape(shape), t.reshape(shape[0], *(1 for _ in event))
                v = velocity(z, t, given)
                check_floating(op, x.device, **{"velocity's result": v})
                if v.shape != shape:
                    raise ValueError(f"{op}: velocity must return x's shape {shape}, got {tuple(v.shape)}")
                v = v.to(x.dtype)
                return v.reshape(x.shape) if of_chunks else v

            return field, x0

        return flow

    def _tangent_field_of_callable(self, x: Tensor, cond: Condition) -> Field:
        """d copies of the rows go through the velocity at once, and copy i gives the derivatives of output i.

        The backward pass thus runs once, as a compiled network requires.
        """
        functional = torch.compiler.is_compiling() or transforms_active()
        if not functional and torch.is_inference_mode_enabled():  # autograd cannot use a tensor that is made there
            with torch.inference_mode(False), torch.no_grad():
                return self._tangent_field_of_callable(x.clone(), each(torch.clone, cond))
        op, d = self.op, x.shape[-1]
        cond = spread(cond, x.shape[:-1])
        copies, cond = x.expand(d, *x.shape), each(lambda part: part.expand(d, *part.shape), cond)
        field, _ = self._flow_of_callable()(copies, cond)

        def velocity(rows: Tensor, t: float | Tensor) -> Tensor:
            point = rows[0].detach().expand(copies.shape)
            pick = torch.eye(d, dtype=point.dtype, device=point.device).reshape(d, *(1,) * (x.ndim - 1), d)
            pick = pick.expand(copies.shape)
            if functional:
                v, to_x, *_ = torch.func.vjp(lambda z: field(z, t), point)
                (jacobian,) = to_x(pick.to(v.dtype))
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    leaf = point.clone().requires_grad_()
                    v = field(leaf, t)
                    if not v.requires_grad:
                        raise ValueError(f"{op}: velocity must be differentiable in x, got a result without a gradient")
                    (jacobian,) = torch.autograd.grad(v, leaf, pick.to(v.dtype), materialize_grads=True)
            with autocast(x.device, None):  # it would round the tangents
                # jacobian[i, ..., j] = ∂v_i/∂x_j
                tangents = torch.einsum("i...j,l...j->l...i", jacobian.detach(), rows[1:])
                return torch.cat([v[:1].detach(), tangents])

        return velocity

    def check_rows(self, x: Tensor, cond: Condition, x_name: str, cond_name: str, num_leading: int) -> Any:
        """Check that x and cond have the widths of a packed MLP and, without autocast, the dtype of its weights.

        Args:
            num_leading: how many leading dimensions the rows have that cond belongs to. An MLP's cond has one more at
                most; what it has beyond them is a callable's.

        Returns cond, which for a packed MLP is a tensor or None.
        """
        op, packed = self.op, self.packed
        if packed is None:
            return cond
        if cond is not None and not (isinstance(cond, Tensor) and cond.ndim <= num_leading + 1):
            raise ValueError(f"{op}: velocity is an MLP, whose {cond_name} is a tensor (..., c), got {brief(cond)}")
        if x.shape[-1] != packed.action_dim:
            size = "·".join(map(str, self.event)) + "=" if len(self.event) > 1 else ""
            raise ValueError(
                f"{op}: velocity moves {packed.action_dim} dimensions, got {x_name} with d={size}{x.shape[-1]}"
            )
        if x.device != packed.device:
            raise ValueError(f"{op}: velocity's weights are on {packed.device}, got {x_name} on {x.device}")
        given = 0 if cond is None else cond.shape[-1]
        if given != packed.cond_dim:
            raise ValueError(
                f"{op}: velocity wants a condition of width {packed.cond_dim}, got {cond_name} of width {given}"
            )
        for name, tensor in ((x_name, x), (cond_name, cond)):
            if not self.autocast and tensor is not None and tensor.dtype != packed.dtype:
                raise ValueError(
                    f"{op}: velocity's weights are {packed.dtype}, got {name} of {tensor.dtype}; convert one, or use "
                    "autocast"
                )
        return cond


def bind(
    op: str, velocity: Velocity, like: Tensor, precision: Precision | None, event: tuple[int, ...]
) -> BoundVelocity:
    """Bind the velocity to the dtype and device of ``like``. A :class:`VelocityMLP` is packed.

    Args:
        event: the shape of one action.
    """
    if is_known(velocity):
        velocity = pack_known(f"{op}: velocity", velocity)
    if not callable(velocity):
        raise TypeError(
            f"{op}: velocity must be a VelocityMLP, a packed MLP or a callable v(x, t, cond), "
            f"got {type(velocity).__name__}"
        )
    packed = velocity if isinstance(velocity, PackedMLP) else None
    dtype = like.dtype if packed is None else packed.dtype
    check_precision(op, precision, dtype, like.dtype)
    device = like.device.type
    settled = settle_precision(precision, dtype, device)
    return BoundVelocity(op, velocity, packed, precision, settled, autocast_enabled(device), event)


def check_start(
    op: str, x0: Tensor, cond: Condition, x0_name: str, cond_name: str, event_dim: int, least: int = 0
) -> tuple[int, ...]:
    """Check that x0 is (..., *event), and that the leading shape of cond broadcasts to x0's; return the event."""
    device = check_floating(op, None, **{x0_name: x0})
    event = check_event(op, x0_name, x0, event_dim, least)
    check_condition(op, cond_name, cond, x0.shape[:-event_dim], device, x0_name)
    return event
