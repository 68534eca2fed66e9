"""Velocity fields that are multi-layer perceptrons, and a form of them whose weights operators read in place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdkernels.activations import ACTIVATIONS, ActivationName
from fdkernels.cpu.layers import linear
from fdkernels.layers import Input, Layer, Network, Norm
from fdkernels.validation import brief, check_at_least, check_choice, check_count, check_flag, is_sequence


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
    """A stack of layers whose weights are read, never copied. Made by ``pack_mlp``; callable as v(x, t, cond)."""

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
