"""A network's weights at one moment, and its architecture.

``PackedMLP`` (``networks.py``) holds modules, whose weights change. A solver reads them once, into a :class:`Network`.
The operators take the same layers as a list of tensors and a text (:class:`EncodedNetwork`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkernels.activations import ACTIVATIONS
from fdkernels.cpu.layers import linear

Input = Literal["cond", "x", "t"]


class Norm(NamedTuple):
    """A layer norm's ε, and its scale and shift: (width,) or, for many networks, (models, width)."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Layer(NamedTuple):
    """A linear map, and the norm_before, activation and norm_after that follow it, if any.

    For many networks at once, every tensor has a leading dimension of models.
    """

    weight: Tensor
    bias: Tensor | None
    norm_before: Norm | None = None
    activation: str | None = None
    norm_after: Norm | None = None

    def to(self, dtype: torch.dtype) -> Layer:
        """The layer with weight and bias in another dtype; no copy if they have it already."""
        if all(t is None or t.dtype == dtype for t in (self.weight, self.bias)):
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        # not _replace, which PyTorch 2.7 does not compile
        return Layer(self.weight.to(dtype), bias, self.norm_before, self.activation, self.norm_after)

    def finish(self, h: Tensor, norm_dtype: torch.dtype | None = None) -> Tensor:
        """Apply what follows the linear map, in h's dtype; a layer norm, and what follows that, in ``norm_dtype``."""
        if self.norm_before is not None:
            h = layer_norm(h.to(norm_dtype or h.dtype), self.norm_before)
        if self.activation is not None:
            h = ACTIVATIONS[self.activation].function(h)
        return h if self.norm_after is None else layer_norm(h.to(norm_dtype or h.dtype), self.norm_after)

    def finish_tangents(self, h: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """`finish` of h (..., width), and what it makes of tangents (lanes, ..., width)."""
        if self.norm_before is not None:
            h, tangents = layer_norm_tangents(h, tangents, self.norm_before)
        if self.activation is not None:
            activation = ACTIVATIONS[self.activation]
            h, tangents = activation.function(h), activation.slope(h) * tangents
        return (h, tangents) if self.norm_after is None else layer_norm_tangents(h, tangents, self.norm_after)


def layer_norm(h: Tensor, norm: Norm) -> Tensor:
    """Normalise h in its dtype. For many networks, each has its own scale and shift."""
    weight, bias = (None if p is None else p.to(h.dtype) for p in (norm.weight, norm.bias))
    if all(p is None or p.ndim == 1 for p in (weight, bias)):
        return F.layer_norm(h, h.shape[-1:], weight, bias, norm.eps)
    h = F.layer_norm(h, h.shape[-1:], eps=norm.eps)
    h = h if weight is None else h * weight.unsqueeze(-2)
    return h if bias is None else h + bias.unsqueeze(-2)


def layer_norm_tangents(h: Tensor, tangents: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`layer_norm` of h (..., width), and of tangents (lanes, ..., width): γ·r·(ḣ − mean ḣ − ĥ·mean(ĥ·ḣ))."""
    centred = h - h.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = centred * scale
    along = (unit * tangents).mean(-1, keepdim=True)
    tangents = scale * (tangents - tangents.mean(-1, keepdim=True) - unit * along)
    return layer_norm(h, norm), tangents if norm.weight is None else tangents * norm.weight.to(h.dtype)


class Network(NamedTuple):
    """A packed MLP's weights at one moment. The first weight is split by input; each layer has its working dtype."""

    columns: dict[Input, Tensor]
    first: Layer
    middle: tuple[Layer, ...]
    last: Layer | None
    """None if the first layer is the only one."""
    operands: torch.dtype
    """The dtype to which the hidden layers' operands are rounded."""

    def operand(self, h: Tensor, layer: Layer) -> Tensor:
        """h as an operand of a hidden layer."""
        return h.to(self.operands).to(layer.weight.dtype)

    def cond_share(self, cond: Tensor | None) -> Tensor | None:
        """Share of condition and bias in the first layer, the same at every step; (..., H), cond's leading shape."""
        if cond is None or "cond" not in self.columns:  # a condition of width 0
            return self.first.bias
        weight = self.columns["cond"]
        return F.linear(cond.to(weight.dtype), weight, self.first.bias)

    def field(self, cond: Tensor | None) -> Callable[[Tensor, float | Tensor], Tensor]:
        """v(x, t) for a fixed condition, whose share of the first layer is computed once, not at every step.

        ``cond`` broadcasts against x, so that one row can serve many samples; t is a number or a tensor (..., 1).
        Works under autograd, ``torch.func`` and ``torch.compile``.
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

    def tangent_field(self, cond: Tensor | None) -> Callable[[Tensor, float | Tensor], Tensor]:
        """`field` of rows and their tangents, (lanes, ..., d): v(x, t) of the first, and ∂v/∂x times each other one.

        The tangents are further rows of the same products, without the bias.
        """
        offset = self.cond_share(cond)
        of_x, of_t = self.columns["x"], self.columns["t"].squeeze(1)

        def velocity(rows: Tensor, t: float | Tensor) -> Tensor:
            h = F.linear(rows, of_x)
            shift = t * of_t if offset is None else t * of_t + offset
            value, tangents = self.first.finish_tangents(h[0] + shift, h[1:])
            for layer in self.middle:
                h = linear(self.operand(_lanes(value, tangents), layer), layer.weight).to(of_x.dtype)
                value = h[0] if layer.bias is None else h[0] + layer.bias.to(h.dtype)
                value, tangents = layer.finish_tangents(value, h[1:])
            if self.last is None:
                return _lanes(value, tangents)
            h = F.linear(_lanes(value, tangents), self.last.weight)
            return h if self.last.bias is None else _lanes(h[0] + self.last.bias, h[1:])

        return velocity


def _lanes(value: Tensor, tangents: Tensor) -> Tensor:
    return torch.cat([value.unsqueeze(0), tangents])


class Architecture(NamedTuple):
    """The architecture of a velocity MLP, as the kernels take it. Tuples have one entry per hidden layer."""

    cond_dim: int
    action_dim: int
    at_cond: int
    """Where the condition's columns begin in the first layer's weight; likewise for x and t."""
    at_x: int
    at_t: int
    widest: int
    widths: tuple[int, ...]
    activations: tuple[str, ...]
    norms: tuple[str, ...]
    """ "none", "before" or "after" the activation."""
    norm_eps: tuple[float, ...]

    @property
    def normalised(self) -> bool:
        return any(norm != "none" for norm in self.norms)


class EncodedNetwork(NamedTuple):
    """A network in the form that operators take."""

    parameters: list[Tensor | None]
    """For each layer: weight, bias, and the scale and shift of its layer norm."""
    text: str
    """The :class:`Architecture`, as text."""

    @property
    def architecture(self) -> Architecture:
        return _decode(self.text)

    def layers(self) -> list[Layer]:
        """The layers, with contiguous tensors. The last one is a product only.

        Tensors of many networks that are stacked more than once become (models, ...).
        """
        net = self.architecture
        layers = []
        for i in range(len(net.widths) + 1):
            weight, bias, scale, shift = self.parameters[4 * i : 4 * i + 4]
            assert weight is not None
            layer = Layer(_stacked_once(weight, 2), None if bias is None else _stacked_once(bias, 1))
            if i < len(net.widths):
                scale, shift = (None if part is None else _stacked_once(part, 1) for part in (scale, shift))
                norm = Norm(scale, shift, net.norm_eps[i])
                layer = layer._replace(
                    norm_before=norm if net.norms[i] == "before" else None,
                    activation=None if net.activations[i] == "none" else net.activations[i],
                    norm_after=norm if net.norms[i] == "after" else None,
                )
            layers.append(layer)
        return layers


def encode(layers: Sequence[Layer], order: Sequence[Input]) -> EncodedNetwork:
    """Encode the layers of one network, whose inputs have this order. A layer has at most one norm."""
    parameters: list[Tensor | None] = []
    norms: list[Norm | None] = []
    for layer in layers:
        norm = layer.norm_before or layer.norm_after
        norms.append(norm)
        parameters += [layer.weight, layer.bias, *((None, None) if norm is None else (norm.weight, norm.bias))]
    hidden = layers[:-1]
    widths = tuple(layer.weight.shape[0] for layer in hidden)
    action_dim = layers[-1].weight.shape[0]
    sizes = {"x": action_dim, "t": 1, "cond": layers[0].weight.shape[1] - action_dim - 1}
    begins = {name: sum(sizes[other] for other in order[:i]) for i, name in enumerate(order)}
    architecture = Architecture(
        cond_dim=sizes["cond"],
        action_dim=action_dim,
        at_cond=begins.get("cond", 0),
        at_x=begins["x"],
        at_t=begins["t"],
        widest=max(widths),
        widths=widths,
        activations=tuple(layer.activation or "none" for layer in hidden),
        norms=tuple("before" if layer.norm_before else "after" if layer.norm_after else "none" for layer in hidden),
        norm_eps=tuple(norm.eps if norm else 0.0 for norm in norms[:-1]),
    )
    text = repr(tuple(architecture)) if torch.compiler.is_compiling() else _encode(architecture)
    return EncodedNetwork([None if parameter is None else parameter.detach() for parameter in parameters], text)


@functools.cache
def _encode(architecture: Architecture) -> str:
    return repr(tuple(architecture))


@functools.cache
def _decode(text: str) -> Architecture:
    return Architecture(*ast.literal_eval(text))


def _stacked_once(parameter: Tensor, ndim: int) -> Tensor:
    return (parameter.flatten(0, -ndim - 1) if parameter.ndim > ndim else parameter).contiguous()
