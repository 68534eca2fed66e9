"""Velocity fields that are multi-layer perceptrons, and a form of them whose weights operators read in place."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fdkernels.activations import ACTIVATIONS, ActivationName, name_of
from fdkernels.backend import autocast
from fdkernels.cpu.layers import linear
from fdkernels.layers import Input, Layer, Network, Norm
from fdkernels.validation import FLOATING, brief, check_at_least, check_choice, check_count, check_flag, is_sequence


class Linear(nn.Linear):
    """``nn.Linear``, computed in the way that suits the processor."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class VelocityMLP(nn.Module):
    """Velocity field v(x, t, cond) as an MLP on the concatenation [cond, x, t].

    A hidden layer is linear, activation, then (with ``layer_norm``) layer normalisation; the output layer is linear.
    Weights start Glorot-uniform and biases zero, as in the published flow policies.

    Args:
        cond_dim: width of the condition (the observation); 0 for an unconditional flow.
        action_dim: d, width of x and of the velocity.
        hidden: widths of the hidden layers.
        activation: a name in ``fdkernels.activations.ACTIVATIONS``, such as ``"gelu_tanh"`` or ``"silu"``.
        layer_norm: normalise after each activation.
        layer_norm_eps: ε of the layer norms.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of its range.
    """

    def __init__(
        self,
        cond_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512,) * 4,
        activation: ActivationName = "gelu_tanh",
        layer_norm: bool = False,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        op = "VelocityMLP"
        cond_dim = check_count(op, "cond_dim", cond_dim, least=0, most=MAX_WIDTH)
        action_dim = check_count(op, "action_dim", action_dim, most=MAX_WIDTH)
        widths = _check_widths(op, cond_dim + action_dim + 1, hidden, action_dim)
        _check_layers(op, activation, layer_norm, layer_norm_eps)
        self.net = _build(widths, activation, layer_norm, layer_norm_eps)
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
    activation: ActivationName = "gelu_tanh",
    layer_norm: bool = False,
    layer_norm_eps: float = 1e-6,
) -> nn.Sequential:
    """The stack inside a :class:`VelocityMLP`: linear, activation, optional layer norm, ..., and a last linear.

    Glorot-uniform weights, zero biases. Policies and critics around a flow use the same stack. Raises the same errors.
    """
    op = "build_mlp"
    inputs = check_count(op, "inputs", inputs, most=2 * MAX_WIDTH)
    outputs = check_count(op, "outputs", outputs, most=MAX_WIDTH)
    widths = _check_widths(op, inputs, hidden, outputs)
    _check_layers(op, activation, layer_norm, layer_norm_eps)
    return _build(widths, activation, layer_norm, layer_norm_eps)


def _build(widths: Sequence[int], activation: str, layer_norm: bool, layer_norm_eps: float) -> nn.Sequential:
    modules: list[nn.Module] = []
    width, *hidden, outputs = widths
    for next_width in hidden:
        modules += [Linear(width, next_width), ACTIVATIONS[activation].module()]
        if layer_norm:
            modules.append(nn.LayerNorm(next_width, eps=float(layer_norm_eps)))
        width = next_width
    modules.append(Linear(width, outputs))
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return nn.Sequential(*modules)


MAX_WIDTH, MAX_LAYERS, MAX_WEIGHTS = 2**20, 2**10, 2**30
"""Larger networks are treated as a mistake."""


def _check_widths(op: str, inputs: int, hidden: Sequence[int], outputs: int) -> list[int]:
    """All widths, from inputs to outputs."""
    if not is_sequence(hidden):
        raise TypeError(f"{op}: hidden must be a sequence of widths, got {type(hidden).__name__}")
    given = itertools.islice(hidden, MAX_LAYERS + 1)
    widths = [inputs, *(check_count(op, "every width in hidden", width, most=MAX_WIDTH) for width in given), outputs]
    if len(widths) > MAX_LAYERS + 2:
        raise ValueError(f"{op}: hidden must have at most {MAX_LAYERS} layers, got more")
    weights = sum(before * after for before, after in itertools.pairwise(widths))
    if weights > MAX_WEIGHTS:
        raise ValueError(
            f"{op}: hidden must make at most {MAX_WEIGHTS} weights, got {brief(hidden)}, which make {weights}"
        )
    return widths


def _check_layers(op: str, activation: str, layer_norm: bool, layer_norm_eps: float) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_flag(op, "layer_norm", layer_norm)
    check_at_least(op, "layer_norm_eps", layer_norm_eps, 0.0)


@dataclasses.dataclass(frozen=True)
class LayerModules:
    """The modules from which a :class:`Layer` is read.

    A solver reads them once, not at every step: under ``torch.func.functional_call`` the modules hold the given tensors
    only during the call, but a checkpointed step is computed again later.
    """

    linear: nn.Linear
    norm_before: nn.LayerNorm | None = None
    activation: str | None = None
    norm_after: nn.LayerNorm | None = None

    def read(self) -> Layer:
        norms = _read_norm(self.norm_before), _read_norm(self.norm_after)
        return Layer(self.linear.weight, self.linear.bias, norms[0], self.activation, norms[1])


def _read_norm(norm: nn.LayerNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight, norm.bias, norm.eps)


@dataclasses.dataclass(frozen=True)
class PackedMLP:
    """A stack of layers whose weights are read, never copied. Made by :func:`pack_mlp`; callable as v(x, t, cond)."""

    layers: tuple[LayerModules, ...]
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

    @property
    def device(self) -> torch.device:
        return self.layers[0].linear.weight.device

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.run(_concatenate(self.order, x, t, cond))

    def run(self, h: Tensor) -> Tensor:
        """The output (..., d) for the concatenated inputs."""
        for layer in self.layers:
            h = layer.read().finish(layer.linear(h))
        return h

    def read(self, outer: torch.dtype, hidden: torch.dtype, products: torch.dtype | None = None) -> Network:
        """The weights as they are now: hidden layers in the dtype ``hidden``, the first and last layer in ``outer``.

        ``products`` is the dtype in which the hidden layers are multiplied, on operands rounded to ``hidden``; None
        stands for ``hidden``.
        """
        first, *rest = [layer.read() for layer in self.layers]
        widths = {"x": self.action_dim, "t": 1, "cond": self.cond_dim}
        columns = first.weight.to(outer).split([widths[name] for name in self.order], dim=1)
        middle = tuple(layer.to(hidden).to(products or hidden) for layer in rest[:-1])
        last = rest[-1].to(outer) if rest else None
        return Network(dict(zip(self.order, columns)), first.to(outer), middle, last, hidden)


def pack_mlp(module: nn.Module, order: Sequence[Input] = ("cond", "x", "t")) -> PackedMLP:
    """Use an existing stack of Linear / activation / LayerNorm as a velocity field, in place.

    Nothing is copied: the next call sees an optimiser step on ``module``. Activations are the modules of
    ``fdkernels.activations.ACTIVATIONS``; a LayerNorm comes after or before the activation. Nested ``nn.Sequential``
    and modules that wrap exactly one child are unwrapped; ``nn.Identity`` and ``nn.Dropout`` in eval mode are skipped.
    What a custom ``forward`` does besides calling its children cannot be seen, so it is tried out on two rows.

    Args:
        module: a :class:`VelocityMLP`, an ``nn.Sequential``, or a module that wraps one.
        order: how the inputs are concatenated; leave ``"cond"`` out for an unconditional flow. Ignored for a
            :class:`VelocityMLP`, which knows its own.

    Returns:
        The packed MLP, callable as v(x, t, cond) and accepted wherever a velocity is.

    Raises:
        TypeError: the module holds anything else, or itself, or does not compute what its stack computes.
        ValueError: widths do not chain, weights are on several devices, or ``order`` is not a permutation of its names.

    Example:
        >>> import torch, fdkernels
        >>> net = torch.nn.Sequential(torch.nn.Linear(3 + 2 + 1, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))
        >>> velocity = fdkernels.pack_mlp(net)
        >>> velocity(torch.zeros(5, 2), torch.zeros(5, 1), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    if isinstance(module, PackedMLP):
        return module
    what = "pack_mlp: module"
    if is_known(module):
        return pack_known(what, module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(module).__name__}")
    names = tuple(itertools.islice(order, 4)) if is_sequence(order) else ()
    if not all(isinstance(name, str) for name in names) or names not in _ORDERS:
        raise ValueError(
            f"pack_mlp: order must name 'x', 't' and, unless unconditional, 'cond' once, got {brief(order)}"
        )
    packed = _pack(what, module, names)
    _try_out(module, packed)
    return packed


_ORDERS = (*itertools.permutations(("cond", "x", "t")), *itertools.permutations(("x", "t")))


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], PackedMLP]] = weakref.WeakKeyDictionary()


def is_known(module: object) -> TypeGuard[VelocityMLP]:
    """Whether it is a VelocityMLP with its own forward."""
    return isinstance(module, VelocityMLP) and type(module).forward is VelocityMLP.forward


def pack_known(what: str, module: VelocityMLP) -> PackedMLP:
    """Packing takes half as long as a launch, so the result is kept until the module changes.

    Args:
        what: the operator and the argument, for messages.
    """
    stack = module.net
    if torch.compiler.is_compiling() or not isinstance(stack, nn.Sequential):
        return _pack(what, stack, module.order)
    settings = ((layer.training, getattr(layer, "approximate", None)) for layer in stack)
    made_of = (*module.order, *stack, *settings)
    before, packed = _known.get(module, ((), None))
    if packed is None or made_of != before:
        packed = _pack(what, stack, module.order)
        if all(next(layer.children(), None) is None for layer in stack):  # changes further down would go unnoticed
            _known[module] = made_of, packed
    return packed


def _pack(what: str, module: nn.Module, order: Sequence[Input]) -> PackedMLP:
    try:
        leaves = list(_leaves(what, module))
    except RecursionError:
        raise TypeError(f"{what} must not contain itself") from None
    layers = tuple(_layers(what, leaves))
    packed = PackedMLP(layers, tuple(order))
    for layer in layers:
        for norm in (layer.norm_before, layer.norm_after):
            if norm is not None and norm.normalized_shape != (layer.linear.out_features,):
                raise ValueError(f"{what}'s {norm} must normalise the {layer.linear.out_features} outputs before it")
    for before, after in itertools.pairwise(layers):
        if before.linear.out_features != after.linear.in_features:
            raise ValueError(f"{what}'s widths do not chain: {before.linear} is followed by {after.linear}")
        if before.linear.weight.device != after.linear.weight.device:
            raise ValueError(f"{what}'s weights must be on one device, got {before.linear.weight.device} and others")
    for layer in layers:
        if layer.linear.weight.dtype not in FLOATING:
            raise TypeError(
                f"{what}'s weights must be float32, bfloat16, float16 or float64, got {layer.linear.weight.dtype}"
            )
    if packed.action_dim < 1 or packed.cond_dim < 0 or ("cond" in order) != (packed.cond_dim > 0):
        raise ValueError(
            f"{what}: with order={tuple(order)} and {packed.action_dim} outputs the first layer must take "
            f"{'cond_dim + ' if 'cond' in order else ''}{packed.action_dim} + 1 inputs, got "
            f"{layers[0].linear.in_features}"
        )
    return packed


@torch.no_grad()
def _try_out(module: nn.Module, packed: PackedMLP) -> None:
    """Check that the module computes what the layers found in it compute."""
    width = packed.layers[0].linear.in_features
    rows = torch.linspace(-1, 1, 2 * width, dtype=packed.dtype, device=packed.device).view(2, width)
    try:
        with autocast(packed.device, None):
            same = torch.allclose(module(rows), packed.run(rows), rtol=1e-3, atol=1e-5, equal_nan=True)
    except Exception as error:  # whatever a custom forward raises
        raise TypeError(
            f"pack_mlp: module {type(module).__name__} cannot be called with the concatenated inputs alone "
            f"({type(error).__name__}: {error}); pass the nn.Sequential inside it"
        ) from error
    if not same:
        raise TypeError(f"pack_mlp: module {type(module).__name__} computes something other than the layers inside it")


def _leaves(what: str, module: nn.Module) -> Iterator[nn.Module]:
    """The modules that compute, in order of execution as far as it can be known."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(what, child)
    elif isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training):
        return
    elif isinstance(module, (nn.Linear, nn.LayerNorm)) or name_of(module) is not None:
        yield module
    else:
        children = list(module.children())
        if len(children) != 1:
            raise TypeError(
                f"{what} must be a VelocityMLP, an nn.Sequential of Linear, activation ({', '.join(ACTIVATIONS)}) and "
                f"LayerNorm, or a module that wraps one; got {type(module).__name__}"
            )
        yield from _leaves(what, children[0])


def _layers(what: str, leaves: list[nn.Module]) -> Iterator[LayerModules]:
    if not leaves or not isinstance(leaves[0], nn.Linear) or not isinstance(leaves[-1], nn.Linear):
        raise TypeError(f"{what} must begin and end with nn.Linear")
    starts = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Linear)]
    for start, end in zip(starts, [*starts[1:], len(leaves)]):
        linear, rest = leaves[start], leaves[start + 1 : end]
        kinds = "".join("n" if isinstance(leaf, nn.LayerNorm) else "a" for leaf in rest)
        if kinds not in ("", "a", "n", "na", "an", "nan"):
            raise TypeError(f"{what} must have between two nn.Linear at most norm, activation, norm, got {rest}")
        before = rest[0] if kinds.startswith("n") else None
        after = rest[-1] if kinds.endswith("n") and len(kinds) > 1 else None
        activation = name_of(rest[kinds.index("a")]) if "a" in kinds else None
        yield LayerModules(linear, before, activation, after)  # type: ignore[arg-type]
