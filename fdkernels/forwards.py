"""A module's forward, read as a concatenation of its inputs and a stack of layers on it, or not, with the reason.

What is read is what the forward computes, found by running it on symbols (``symbols.py``). A weight is known by being
the same tensor as a module's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fdkernels.activations import ACTIVATIONS
from fdkernels.symbols import RESHAPES, UnreadableError, is_size, operation, run_on_symbols

Leaf = nn.Linear | nn.LayerNorm | str
"""A part of a stack; an activation is its name in ``ACTIVATIONS``."""

_Module = TypeVar("_Module", bound=nn.Module)
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16"}
_CONCATENATIONS = {"cat", "concat", "concatenate", "hstack"}
_SUMS, _PRODUCTS = {"add", "sub"}, {"mul", "addcmul"}
_MEANINGS = {
    **dict.fromkeys(("sin", "cos"), "a sinusoidal embedding"),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), "attention"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "a convolution"),
    **dict.fromkeys(("getitem", "chunk", "split"), "a slice"),
    **dict.fromkeys(_CASTS, "a cast to another dtype"),
    "embedding": "a learned embedding",
    "batch_norm": "batch normalisation",
    "group_norm": "a group norm",
    "rms_norm": "an RMS norm",
    "linear": "a linear map with computed weights",
    "detach": "a stopped gradient",
    "dropout": "dropout in training mode, which module.eval() ends,",
}


class Forward(NamedTuple):
    """What a forward computes: a concatenation of its inputs, and a stack of layers on it."""

    inputs: tuple[str, ...]
    """Names of the inputs in the order of their concatenation."""
    leaves: list[Leaf]


def steady_weights(module: nn.Module) -> contextlib.AbstractContextManager:
    """The context in which a parametrised weight, which is computed when asked for, is the same tensor every time."""
    parametrised = any(parametrize.is_parametrized(child) for child in module.modules())
    return parametrize.cached() if parametrised else contextlib.nullcontext()


def read_forward(module: nn.Module, inputs: Sequence[str], call: Callable[..., Any]) -> Forward:
    """Read the module's forward as a stack of layers. Within :func:`steady_weights`.

    Args:
        inputs: names for the inputs.
        call: calls the module with one symbol for each of them.

    Raises:
        UnreadableError: the forward computes anything else.
    """
    output = run_on_symbols(module, inputs, call)
    return _Reader(module).read(output)


class _Reader:
    """Follows the graph from the output back to the inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.linears: dict[tuple[int, int], nn.Linear] = {}
        self.norms: dict[tuple[int, int], nn.LayerNorm] = {}
        for child in module.modules():
            if isinstance(child, nn.Linear):
                self.linears[id(child.weight), id(child.bias)] = child
            elif isinstance(child, nn.LayerNorm):
                self.norms[id(child.weight), id(child.bias)] = child

    def read(self, output: fx.Node) -> Forward:
        past = set(_ancestors(output))
        for node in output.graph.nodes:
            if node not in past and _writes(node):
                raise UnreadableError(f"an operation in place whose result is not used {_where(node)}")
        leaves: list[Leaf] = []
        node = output
        try:
            node = _skip(node)
            while node.op != "placeholder" and operation(node) not in _CONCATENATIONS:
                leaf, before = self.leaf(node)
                leaves.append(leaf)
                node = _skip(before)
            return Forward(tuple(_inputs(node)), leaves[::-1])
        except UnreadableError:
            raise
        except Exception as error:  # operations may be called in more ways than are expected here
            raise UnreadableError(f"a step that is not understood {_where(node)}") from error

    def leaf(self, node: fx.Node) -> tuple[Leaf, fx.Node]:
        """The part of a stack that the node is, and the node before it."""
        name, operands = operation(node), _operands(node)
        for gate, h in (operands, operands[::-1]) if name == "mul" and len(operands) == 2 else ():
            if operation(gate) == "sigmoid" and _operands(gate) == [h]:
                return "silu", h
        if len(operands) == 1:
            if name == "linear":
                weights = _argument(node, 1, "weight"), _argument(node, 2, "bias")
                linear = self.linears.get((id(weights[0]), id(weights[1])))
                if linear is None:
                    raise UnreadableError(f"a linear map whose weights are not those of an nn.Linear {_where(node)}")
                return _without_hooks(linear, node), operands[0]
            if name == "layer_norm":
                return self.norm(node), operands[0]
            form = str(node.kwargs.get("approximate", "none")) if name == "gelu" else ""
            for activation, row in ACTIVATIONS.items():
                if row.torch == (name, form):
                    return activation, operands[0]
        raise UnreadableError(_explain(node))

    def norm(self, node: fx.Node) -> nn.LayerNorm:
        shape, eps = _normalized_shape(node), _argument(node, 4, "eps", 1e-5)
        weight, bias = _argument(node, 2, "weight"), _argument(node, 3, "bias")
        if weight is None and bias is None:
            return nn.LayerNorm(shape, eps, elementwise_affine=False)
        norm = self.norms.get((id(weight), id(bias)))
        if norm is None or (norm.normalized_shape, norm.eps) != (shape, eps):
            raise UnreadableError(f"a layer norm whose weights and ε are not those of an nn.LayerNorm {_where(node)}")
        return _without_hooks(norm, node)


def _without_hooks(module: _Module, node: fx.Node) -> _Module:
    """The module, unless hooks make its weights: too late for operators, which read them between calls."""
    if not vars(module).keys().isdisjoint(("weight", "bias")):
        raise UnreadableError(
            f"weights that a hook makes at every call {_where(node)}, in place of which there is "
            "torch.nn.utils.parametrizations"
        )
    return module


def _normalized_shape(norm: fx.Node) -> tuple[int, ...]:
    """What the layer norm normalises over. The trial shows whether the last size of a symbol is the width before it."""
    given = _argument(norm, 1, "normalized_shape")
    sizes = given if isinstance(given, (list, tuple)) else (given,)
    numbers = [_width_before(norm) if _is_last_size(size) else size for size in sizes]
    if not all(isinstance(number, int) for number in numbers):
        raise UnreadableError(f"a layer norm over a computed size {_where(norm)}")
    return tuple(numbers)


def _is_last_size(size: Any) -> bool:
    """Whether it is ``h.size(-1)``, ``h.shape[-1]`` or ``h.shape[-1:]``."""
    if isinstance(size, fx.Node) and operation(size) == "getitem":
        whole, index = size.args
        return isinstance(whole, fx.Node) and operation(whole) == "size" and index in (-1, slice(-1, None))
    return isinstance(size, fx.Node) and operation(size) == "size" and size.args[1:] == (-1,)


def _width_before(norm: fx.Node) -> int:
    """The number of outputs of the last linear map before the layer norm."""
    node = norm
    while operation(node) != "linear":
        if node.op == "placeholder":
            raise UnreadableError(f"a layer norm of its inputs {_where(norm)}")
        node = _operands(node)[0]
    weight = _argument(node, 1, "weight")
    if not isinstance(weight, Tensor):
        raise UnreadableError(_explain(node))
    return weight.shape[0]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among the node's inputs; sizes are none."""
    return [operand for operand in node.all_input_nodes if not is_size(operand)]


def _writes(node: fx.Node) -> bool:
    """Whether it changes a tensor in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op != "placeholder" and name.endswith("_") and not name.endswith("__")
    return in_place or name == "setitem" or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _skip(node: fx.Node) -> fx.Node:
    """The node without what leaves rows as they are. What a reshape does to shapes is left to the trial."""
    while node.op != "placeholder" and _operands(node) and _changes_nothing(node):
        node = _operands(node)[0]
    return node


def _changes_nothing(node: fx.Node) -> bool:
    name = operation(node)
    if name in _CASTS:
        asked = (*node.args, *node.kwargs.values(), getattr(torch, name, None))  # torch.float and so on are dtypes
        dtypes = [getattr(part, "dtype", part) for part in asked]
        return all(dtype == node.meta["dtype"] for dtype in dtypes if isinstance(dtype, torch.dtype))
    if name == "dropout":
        return not _argument(node, 2, "training", True) or _argument(node, 1, "p", 0.5) == 0
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(part is None or part is ... or (isinstance(part, slice) and part == slice(None)) for part in index)
    return name in RESHAPES


def _inputs(node: fx.Node) -> Iterator[str]:
    """The names of the inputs that are concatenated."""
    if node.op == "placeholder":
        yield str(node.target)
        return
    if operation(node) not in _CONCATENATIONS:
        raise UnreadableError(_explain_branch(node))
    parts, dim = _argument(node, 0, "tensors"), _argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if operation(node) != "hstack" and dim not in (-1, 1):
        raise UnreadableError(f"a concatenation along dimension {dim} instead of the last one {_where(node)}")
    for part in parts if isinstance(parts, (list, tuple)) else ():
        if not isinstance(part, fx.Node):
            raise UnreadableError(f"a concatenation with a constant {_where(node)}")
        yield from _inputs(_skip(part))


# -- what is not a stack of layers, in words ---------------------------------------------------------------------------


def _explain(node: fx.Node) -> str:
    """Why the node is no part of a stack of layers."""
    name, operands = operation(node), _operands(node)
    if len(operands) > 1 and name in _SUMS | _PRODUCTS:
        products = [step for step in (node, *operands) if operation(step) in _PRODUCTS and len(_operands(step)) > 1]
        if products:
            return f"a product of computed values, as in FiLM or gating, {_where(products[0])}"
        before = [_ancestors(operand) for operand in operands]
        whole = [_operands(operand)[0] if operation(operand) == "getitem" else operand for operand in operands]
        if whole[0] in before[1] or whole[1] in before[0]:
            return f"a residual connection {_where(node)}"
        aside = [past[0] for past in before if _is_aside(past) and past[0].op != "placeholder"]
        return _explain_branch(aside[0]) if aside else f"a sum of two branches {_where(node)}"
    if name in _SUMS | _PRODUCTS | {"div", "truediv", "neg"}:
        return f"arithmetic with a constant {_where(node)}"
    other = f"an operation other than linear, layer norm and the activations {', '.join(ACTIVATIONS)}"
    return f"{_MEANINGS.get(name, other)} {_where(node)}"


def _explain_branch(node: fx.Node) -> str:
    """Why something computed from inputs is not concatenated with them, or added to layers."""
    past = _ancestors(node)
    sources = _sources(past)
    names = {operation(step): step for step in past}
    of = f"of {' and '.join(sources)} " if sources else ""
    for name in ("sin", "cos", "embedding"):
        if name in names:
            return f"{_MEANINGS[name]} {of}{_where(names[name])}"
    if "linear" in names and _is_aside(past):
        return f"layers of {' and '.join(sources)} alone {_where(names['linear'])}"
    if "linear" in names:
        return f"a concatenation with a hidden layer {_where(next(iter(node.users)))}"
    return _explain(node)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and all that it is computed from, in no order but with the node first."""
    found = {node: None}
    for step in (queue := [node]):
        for operand in _operands(step):
            if operand not in found:
                found[operand] = None
                queue.append(operand)
    return list(found)


def _sources(nodes: list[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "placeholder"]


def _is_aside(past: list[fx.Node]) -> bool:
    """Whether this comes from one of several inputs."""
    inputs = [node for node in past[0].graph.nodes if node.op == "placeholder"]
    return len(inputs) > 1 and len(_sources(past)) == 1


def _where(node: fx.Node) -> str:
    return f"({operation(node)}{node.meta['place']})"
