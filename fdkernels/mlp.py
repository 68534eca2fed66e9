"""Velocity fields that are multi-layer perceptrons, in a form whose weights the operators can read in place."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkernels.cpu_layers import gelu_tanh, linear

Activation = Literal["gelu_tanh", "gelu", "silu", "relu", "tanh"]
Input = Literal["cond", "x", "t"]


class Linear(nn.Linear):
    """``nn.Linear``, in the way that suits the processor."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GELU(nn.GELU):
    """``nn.GELU`` in its tanh form, in the way that suits the processor."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, h: Tensor) -> Tensor:
        return gelu_tanh(h) if self.approximate == "tanh" else super().forward(h)


_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "gelu_tanh": (GELU, gelu_tanh),
    "gelu": (nn.GELU, F.gelu),
    "silu": (nn.SiLU, F.silu),
    "relu": (nn.ReLU, F.relu),
    "tanh": (nn.Tanh, torch.tanh),
}


class VelocityMLP(nn.Module):
    """Velocity field v(x, t, cond) as an MLP on the concatenation [cond, x, t].

    A hidden layer is linear, activation, then (with ``layer_norm``) layer normalisation; the output layer is linear.
    Weights start Glorot-uniform and biases zero, as in the published flow policies.

    Args:
        cond_dim: width of the condition (the observation); 0 for an unconditional flow.
        action_dim: d, width of x and of the velocity.
        hidden: widths of the hidden layers.
        activation: ``"gelu_tanh"``, ``"gelu"``, ``"silu"``, ``"relu"`` or ``"tanh"``.
        layer_norm: normalise after each activation.
        layer_norm_eps: its ε.
    """

    def __init__(
        self,
        cond_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512,) * 4,
        activation: Activation = "gelu_tanh",
        layer_norm: bool = False,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if cond_dim < 0 or action_dim < 1 or any(width < 1 for width in hidden):
            raise ValueError(
                f"VelocityMLP: cond_dim must be >= 0, action_dim and every hidden width >= 1, got "
                f"cond_dim={cond_dim}, action_dim={action_dim}, hidden={tuple(hidden)}"
            )
        self.net = build_mlp(cond_dim + action_dim + 1, hidden, action_dim, activation, layer_norm, layer_norm_eps)
        self.order: Sequence[Input] = ("cond", "x", "t") if cond_dim else ("x", "t")

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity (..., d) at points x (..., d), times t (..., 1) and conditions (..., c). Differentiable."""
        return self.net(_concatenate(self.order, x, t, cond))


def _concatenate(order: Sequence[Input], x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    lead = x.shape[:-1]
    inputs = {"x": x, "t": t.expand(*lead, 1)}
    if cond is not None:
        inputs["cond"] = cond.expand(*lead, cond.shape[-1])
    return torch.cat([inputs[name] for name in order], dim=-1)


def build_mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: Activation = "gelu_tanh",
    layer_norm: bool = False,
    layer_norm_eps: float = 1e-6,
) -> nn.Sequential:
    """The stack inside a :class:`VelocityMLP`: linear, activation, optional layer norm, ...; a last linear.

    Glorot-uniform weights, zero biases. Policies and critics around a flow use the same.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"build_mlp: activation must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {activation!r}"
        )
    modules: list[nn.Module] = []
    width = inputs
    for next_width in hidden:
        modules += [Linear(width, next_width), _ACTIVATIONS[activation][0]()]
        if layer_norm:
            modules.append(nn.LayerNorm(next_width, eps=layer_norm_eps))
        width = next_width
    modules.append(Linear(width, outputs))
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return nn.Sequential(*modules)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear map and what follows it, in this order: norm_before, activation, norm_after."""

    linear: nn.Linear
    norm_before: nn.LayerNorm | None = None
    activation: str | None = None
    norm_after: nn.LayerNorm | None = None

    def read(self) -> LayerTensors:
        return LayerTensors(
            self.linear.weight,
            self.linear.bias,
            _read_norm(self.norm_before),
            self.activation,
            _read_norm(self.norm_after),
        )


class Norm(NamedTuple):
    """Arguments of ``F.layer_norm``."""

    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _read_norm(norm: nn.LayerNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class LayerTensors(NamedTuple):
    """The tensors of a :class:`Layer` at one moment.

    A solver reads them once and not at every step: under ``torch.func.functional_call`` the modules hold the given
    tensors for the time of the call only, and a checkpointed step is computed again later.
    """

    weight: Tensor
    bias: Tensor | None
    norm_before: Norm | None
    activation: str | None
    norm_after: Norm | None

    def to(self, dtype: torch.dtype) -> LayerTensors:
        """Weight and bias in another dtype; no copy where they have it already."""
        if all(t is None or t.dtype == dtype for t in (self.weight, self.bias)):
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return LayerTensors(self.weight.to(dtype), bias, self.norm_before, self.activation, self.norm_after)

    def finish(self, h: Tensor) -> Tensor:
        """What follows the linear map."""
        if self.norm_before is not None:
            h = layer_norm(h, self.norm_before)
        if self.activation is not None:
            h = activation_function(self.activation)(h)
        return h if self.norm_after is None else layer_norm(h, self.norm_after)


def activation_function(activation: str) -> Callable[[Tensor], Tensor]:
    return _ACTIVATIONS[activation][1]


def layer_norm(h: Tensor, norm: Norm) -> Tensor:
    weight, bias = (None if p is None else p.to(h.dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(h, norm.shape, weight, bias, norm.eps)


@dataclasses.dataclass(frozen=True)
class PackedMLP:
    """A stack of layers that are read, never copied. Made by :func:`pack_mlp`; callable as v(x, t, cond)."""

    layers: tuple[Layer, ...]
    order: tuple[Input, ...]

    @property
    def action_dim(self) -> int:
        return self.layers[-1].linear.out_features

    @property
    def cond_dim(self) -> int:
        return self.layers[0].linear.in_features - self.action_dim - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].linear.weight.dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = _concatenate(self.order, x, t, cond)
        for layer in self.layers:
            h = layer.read().finish(layer.linear(h))
        return h

    def read(self, outer: torch.dtype, hidden: torch.dtype, products: torch.dtype | None = None) -> MLPTensors:
        """The weights as they are now, the hidden layers' in ``hidden`` and the first and last in ``outer``.

        ``products`` is the dtype in which the hidden layers are multiplied, on operands rounded to ``hidden``, where
        that is another one.
        """
        first, *rest = [layer.read() for layer in self.layers]
        widths = {"x": self.action_dim, "t": 1, "cond": self.cond_dim}
        columns = first.weight.to(outer).split([widths[name] for name in self.order], dim=1)
        middle = tuple(layer.to(hidden).to(products or hidden) for layer in rest[:-1])
        last = rest[-1].to(outer) if rest else None
        return MLPTensors(dict(zip(self.order, columns)), first.to(outer), middle, last, hidden)


@dataclasses.dataclass(frozen=True)
class MLPTensors:
    """A packed MLP's weights at one moment: the first weight by inputs, the layers in the dtypes they work in."""

    columns: dict[Input, Tensor]
    first: LayerTensors
    middle: tuple[LayerTensors, ...]
    last: LayerTensors | None  # None where the first layer is the only one
    operands: torch.dtype  # what the hidden layers' operands are rounded to

    def operand(self, h: Tensor, layer: LayerTensors) -> Tensor:
        """h as a hidden layer multiplies it."""
        return h.to(self.operands).to(layer.weight.dtype)

    def cond_share(self, cond: Tensor | None) -> Tensor | None:
        """What the condition and the bias put into the first layer at every step, (..., H) in cond's leading shape."""
        if cond is None:
            return self.first.bias
        weight = self.columns["cond"]
        return F.linear(cond.to(weight.dtype), weight, self.first.bias)

    def field(self, cond: Tensor | None) -> Callable[[Tensor, float | Tensor], Tensor]:
        """v(x, t) for a fixed condition, whose share of the first layer is computed once and not at every step.

        ``cond`` broadcasts against x, so that one row can serve many samples; t is a number or a tensor (..., 1).
        For autograd, ``torch.func`` and ``torch.compile``.
        """
        offset = self.cond_share(cond)
        of_x, of_t = self.columns["x"], self.columns["t"].squeeze(1)

        def velocity(x: Tensor, t: float | Tensor) -> Tensor:
            h = F.linear(x, of_x) + t * of_t
            if offset is not None:
                h = h + offset
            h = self.first.finish(h)
            for layer in self.middle:
                h = layer.finish(linear(self.operand(h, layer), layer.weight, layer.bias).to(of_x.dtype))
            return h if self.last is None else F.linear(h, self.last.weight, self.last.bias)

        return velocity


def pack_mlp(module: nn.Module, order: Sequence[Input] = ("cond", "x", "t")) -> PackedMLP:
    """Read an existing stack of Linear / activation / LayerNorm as a velocity field, in place.

    Nothing is copied: an optimiser step on ``module`` is seen by the next call. Activations are GELU (either form),
    SiLU, ReLU and Tanh; a LayerNorm stands after or before the activation. Nested ``nn.Sequential`` and modules that
    wrap exactly one child are looked through, ``nn.Identity`` and ``nn.Dropout`` in eval mode are passed over. What a
    ``forward`` of your own does beside calling its children cannot be seen, so it is tried out on two rows.

    Args:
        module: a :class:`VelocityMLP`, an ``nn.Sequential``, or a module that wraps one.
        order: how the inputs are concatenated; leave ``"cond"`` out for an unconditional flow. Ignored for a
            :class:`VelocityMLP`, which knows its own.

    Returns:
        The packed MLP, callable as v(x, t, cond) and accepted wherever a velocity is.

    Raises:
        TypeError: the module holds something else than the above, or computes something else than its stack.
        ValueError: widths do not chain, or ``order`` is not a permutation of its names.

    Example:
        >>> import torch, fdkernels
        >>> net = torch.nn.Sequential(torch.nn.Linear(3 + 2 + 1, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))
        >>> velocity = fdkernels.pack_mlp(net)
        >>> velocity(torch.zeros(5, 2), torch.zeros(5, 1), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    if isinstance(module, PackedMLP):
        return module
    if isinstance(module, VelocityMLP) and type(module).forward is VelocityMLP.forward:
        return _pack_known(module)
    if sorted(order) not in (["cond", "t", "x"], ["t", "x"]):
        raise ValueError(
            f"pack_mlp: order must name 'x', 't' and, unless unconditional, 'cond' once, got {tuple(order)}"
        )
    packed = _pack(module, order)
    _try_out(module, packed.layers)
    return packed


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], PackedMLP]] = weakref.WeakKeyDictionary()


def _pack_known(module: VelocityMLP) -> PackedMLP:
    """Packing takes as long as half a launch, so what was made is kept for as long as it is what would be made."""
    stack = module.net
    if torch.compiler.is_compiling() or not isinstance(stack, nn.Sequential):
        return _pack(stack, module.order)
    settings = ((layer.training, getattr(layer, "approximate", None)) for layer in stack)
    made_of = (*module.order, *stack, *settings)
    before, packed = _known.get(module, ((), None))
    if packed is None or made_of != before:
        packed = _pack(stack, module.order)
        if all(next(layer.children(), None) is None for layer in stack):  # further down nothing would be noticed
            _known[module] = made_of, packed
    return packed


def _pack(module: nn.Module, order: Sequence[Input]) -> PackedMLP:
    layers = tuple(_layers(list(_leaves(module))))
    packed = PackedMLP(layers, tuple(order))
    for layer in layers:
        for norm in (layer.norm_before, layer.norm_after):
            if norm is not None and norm.normalized_shape != (layer.linear.out_features,):
                raise ValueError(f"pack_mlp: {norm} must normalise the {layer.linear.out_features} outputs before it")
    for before, after in itertools.pairwise(layers):
        if before.linear.out_features != after.linear.in_features:
            raise ValueError(f"pack_mlp: widths do not chain: {before.linear} is followed by {after.linear}")
    if packed.cond_dim < 0 or ("cond" in order) != (packed.cond_dim > 0):
        raise ValueError(
            f"pack_mlp: with order={tuple(order)} and {packed.action_dim} outputs the first layer must take "
            f"{'cond_dim + ' if 'cond' in order else ''}{packed.action_dim} + 1 inputs, got "
            f"{layers[0].linear.in_features}"
        )
    return packed


@torch.no_grad()
def _try_out(module: nn.Module, layers: tuple[Layer, ...]) -> None:
    """A module must compute what the layers found in it compute."""
    weight = layers[0].linear.weight
    rows = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    stack = rows
    for layer in layers:
        stack = layer.read().finish(layer.linear(stack))
    try:
        same = torch.allclose(module(rows), stack, rtol=1e-3, atol=1e-5)
    except Exception as error:  # whatever a forward of somebody's own raises
        raise TypeError(
            f"pack_mlp: {type(module).__name__} cannot be called with the concatenated inputs alone "
            f"({type(error).__name__}: {error}); pass the nn.Sequential inside it"
        ) from error
    if not same:
        raise TypeError(f"pack_mlp: {type(module).__name__} computes something else than the layers inside it")


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that compute, in order of execution, as far as that can be known."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    elif isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training):
        return
    elif isinstance(module, (nn.Linear, nn.LayerNorm)) or _activation_name(module) is not None:
        yield module
    else:
        children = list(module.children())
        if len(children) != 1:
            raise TypeError(
                "pack_mlp: module must be a VelocityMLP, an nn.Sequential of Linear, activation (GELU, SiLU, ReLU, "
                f"Tanh) and LayerNorm, or a module that wraps one; got {type(module).__name__}"
            )
        yield from _leaves(children[0])


def _activation_name(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh"}
    return names.get(type(module))


def _layers(leaves: list[nn.Module]) -> Iterator[Layer]:
    if not leaves or not isinstance(leaves[0], nn.Linear) or not isinstance(leaves[-1], nn.Linear):
        raise TypeError("pack_mlp: the stack must begin and end with nn.Linear")
    starts = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Linear)]
    for start, end in zip(starts, [*starts[1:], len(leaves)]):
        linear, rest = leaves[start], leaves[start + 1 : end]
        kinds = "".join("n" if isinstance(leaf, nn.LayerNorm) else "a" for leaf in rest)
        if kinds not in ("", "a", "n", "na", "an", "nan"):
            raise TypeError(f"pack_mlp: between two nn.Linear at most norm, activation, norm, got {rest}")
        before = rest[0] if kinds.startswith("n") else None
        after = rest[-1] if kinds.endswith("n") and len(kinds) > 1 else None
        activation = _activation_name(rest[kinds.index("a")]) if "a" in kinds else None
        yield Layer(linear, before, activation, after)  # type: ignore[arg-type]
