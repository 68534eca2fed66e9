"""What a module's forward does, found by running it on symbols instead of tensors.

The symbols are ``torch.fx`` proxies. ``torch.fx.symbolic_trace`` itself would not do: it patches every module of the
process while it runs, so that other threads would be traced too, and it stops at the shapes and devices that forwards
ask their inputs for. Here modules run as they are, hooks and parametrisations included, and a weight is known by being
the same tensor as a module's.
"""

from __future__ import annotations

import linecache
import operator
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn.utils import parametrize

from fdkernels.activations import ACTIVATIONS

Leaf = nn.Linear | nn.LayerNorm | str
"""A part of a stack; an activation is its name in ``ACTIVATIONS``."""

ROWS = 2
"""A symbol stands for a tensor (ROWS, width) of unknown width."""
_RESHAPES = {
    "contiguous", "clone", "expand", "expand_as", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
    "squeeze", "unsqueeze", "atleast_2d",
}  # fmt: skip
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16"}
_CONCATENATIONS = {"cat", "concat", "concatenate", "hstack"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SIZES = {"size", "dim", "numel", "getattr"}
_SUMS, _PRODUCTS = {"add", "sub"}, {"mul", "addcmul"}
_MEANINGS = {
    "sin": "a sinusoidal embedding",
    "cos": "a sinusoidal embedding",
    "embedding": "a learned embedding",
    "conv1d": "a convolution",
    "conv2d": "a convolution",
    "batch_norm": "batch normalisation",
    "rms_norm": "an RMS norm",
    "group_norm": "a group norm",
    "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "attention",
    "dropout": "dropout in training mode, which module.eval() ends,",
    "detach": "a stopped gradient",
    "getitem": "a slice",
    "chunk": "a slice",
    **dict.fromkeys(_CASTS, "a cast to another dtype"),
    "split": "a slice",
}
_NOT_THE_USERS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


class UnreadableError(Exception):
    """What a forward has and a stack of layers has not, in words."""


class Forward(NamedTuple):
    """What a forward computes: a concatenation of its inputs, and a stack of layers on it."""

    inputs: tuple[str, ...]
    """Names of the inputs in the order of their concatenation."""
    leaves: list[Leaf]


def read_forward(module: nn.Module, inputs: Sequence[str], call: Callable[..., Any]) -> Forward:
    """Read the module's forward as a stack of layers.

    Args:
        inputs: names for the inputs.
        call: calls the module with one symbol for each of them.

    Raises:
        UnreadableError: the forward computes anything else.
    """
    weights = [p for p in module.parameters() if p.is_floating_point()]
    if not weights:
        raise UnreadableError("a lack of weights")
    tracer = _Tracer(module, weights[0])
    symbols = [tracer.create_proxy("placeholder", name, (), {}) for name in inputs]
    # cached, so that a parametrised weight is the same tensor whenever it is asked for
    with parametrize.cached():
        try:
            out = call(*symbols)
        except Exception as error:  # whatever a custom forward raises
            raise UnreadableError(_failure(error, tracer.names)) from error
        if not isinstance(out, fx.Proxy):
            kind = "a constant" if isinstance(out, Tensor) else f"{type(out).__name__} in place of a tensor"
            raise UnreadableError(f"what it returns, {kind}")
        return _Reader(module).read(out.node)


class _Tracer(GraphAppendingTracer):
    def __init__(self, module: nn.Module, like: Tensor) -> None:
        super().__init__(fx.Graph())
        self.names = {id(child): name for name, child in module.named_modules()}
        self.device, self.dtype = like.device, like.dtype

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        node.meta["dtype"] = self.dtype
        node.meta["place"] = _place(traceback.walk_stack(None), self.names)
        made_of_rows = all(operand.meta["rows"] for operand in node.all_input_nodes)
        node.meta["rows"] = made_of_rows and _name(node) not in _RESHAPES | _SIZES | {"getitem"}
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Width(node, self) if _name(node) == "size" and node.args[1:] == (-1,) else _Symbol(node, self)


class _Symbol(fx.Proxy):
    """Answers what forwards ask a tensor for, as far as it is known."""

    tracer: _Tracer

    @property
    def device(self) -> torch.device:
        return self.tracer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tracer.dtype

    @property
    def ndim(self) -> Any:
        return self.dim()

    @property
    def shape(self) -> Any:
        return self.size()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a protocol, such as NumPy's
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __index__(self) -> int:
        raise TraceError("a number is asked for")

    __int__ = __float__ = __index__

    def dim(self) -> Any:
        return 2 if self.node.meta["rows"] else self._ask("dim")

    def size(self, dim: int | None = None) -> Any:
        if not self.node.meta["rows"]:
            return self._ask("size") if dim is None else self._ask("size", dim)
        if dim is None:
            return ROWS, self._ask("size", -1)
        return ROWS if dim in (0, -2) else self._ask("size", -1)

    def numel(self) -> int:
        return ROWS  # few enough for cpu/layers.py to choose PyTorch's own functions

    def _ask(self, method: str, *args: int) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", method, (self, *args), {})


class _Width(_Symbol):
    """The width of an input. Forwards compare it with what they expect, and the trial shows whether it is that."""

    __hash__ = fx.Proxy.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


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
        node = _skip(output)
        while node.op != "placeholder" and _name(node) not in _CONCATENATIONS:
            leaf, before = self.leaf(node)
            leaves.append(leaf)
            node = _skip(before)
        return Forward(tuple(_inputs(node)), leaves[::-1])

    def leaf(self, node: fx.Node) -> tuple[Leaf, fx.Node]:
        """The part of a stack that the node is, and the node before it."""
        name, operands = _name(node), _operands(node)
        for gate, h in (operands, operands[::-1]) if name == "mul" and len(operands) == 2 else ():
            if _name(gate) == "sigmoid" and _operands(gate) == [h]:
                return "silu", h
        if len(operands) == 1:
            if name == "linear":
                weights = _argument(node, 1, "weight"), _argument(node, 2, "bias")
                linear = self.linears.get((id(weights[0]), id(weights[1])))
                if linear is None:
                    raise UnreadableError(f"a linear map whose weights are not those of an nn.Linear {_where(node)}")
                if "weight" in vars(linear):  # too late for operators, which read it between calls
                    raise UnreadableError(
                        f"weights that a hook makes at every call {_where(node)}, in place of which there is "
                        "torch.nn.utils.parametrizations"
                    )
                return linear, operands[0]
            if name == "layer_norm":
                return self.norm(node), operands[0]
            form = str(node.kwargs.get("approximate", "none")) if name == "gelu" else ""
            for activation, row in ACTIVATIONS.items():
                if row.torch == (name, form):
                    return activation, operands[0]
        raise UnreadableError(_explain(node))

    def norm(self, node: fx.Node) -> nn.LayerNorm:
        shape, eps = tuple(_argument(node, 1, "normalized_shape")), _argument(node, 4, "eps", 1e-5)
        weight, bias = _argument(node, 2, "weight"), _argument(node, 3, "bias")
        if weight is None and bias is None:
            return nn.LayerNorm(shape, eps, elementwise_affine=False)
        norm = self.norms.get((id(weight), id(bias)))
        if norm is None or (norm.normalized_shape, norm.eps) != (shape, eps):
            raise UnreadableError(f"a layer norm whose weights and ε are not those of an nn.LayerNorm {_where(node)}")
        return norm


def _name(node: fx.Node) -> str:
    """The operation without regard to how it was written: ``F.relu``, ``torch.relu_`` and ``h.relu()`` are "relu"."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name if node.op == "placeholder" else name.rstrip("_")


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among the node's inputs; sizes are none."""
    return [operand for operand in node.all_input_nodes if not _is_size(operand)]


def _is_size(node: fx.Node) -> bool:
    return node.op != "placeholder" and (
        _name(node) in _SIZES or (bool(node.all_input_nodes) and all(map(_is_size, node.all_input_nodes)))
    )


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
    name = _name(node)
    if name in _CASTS:
        asked = (*node.args, *node.kwargs.values(), getattr(torch, name, None))  # torch.float and so on are dtypes
        return all(part == node.meta["dtype"] for part in asked if isinstance(part, torch.dtype))
    if name == "dropout":
        return not _argument(node, 2, "training", True) or _argument(node, 1, "p", 0.5) == 0
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(part in (None, ..., slice(None)) for part in index)
    return name in _RESHAPES


def _inputs(node: fx.Node) -> Iterator[str]:
    """The names of the inputs that are concatenated."""
    if node.op == "placeholder":
        yield str(node.target)
        return
    if _name(node) not in _CONCATENATIONS:
        raise UnreadableError(_explain_branch(node))
    parts, dim = node.args[0], _argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if _name(node) != "hstack" and dim not in (-1, 1):
        raise UnreadableError(f"a concatenation along dimension {dim} instead of the last one {_where(node)}")
    for part in parts if isinstance(parts, (list, tuple)) else ():
        if not isinstance(part, fx.Node):
            raise UnreadableError(f"a concatenation with a constant {_where(node)}")
        yield from _inputs(_skip(part))


# -- what is not a stack of layers, in words ---------------------------------------------------------------------------


def _explain(node: fx.Node) -> str:
    """Why the node is no part of a stack of layers."""
    name, operands = _name(node), _operands(node)
    if len(operands) > 1 and name in _SUMS | _PRODUCTS:
        products = [step for step in (node, *operands) if _name(step) in _PRODUCTS and len(_operands(step)) > 1]
        if products:
            return f"a product of computed values, as in FiLM or gating, {_where(products[0])}"
        before = [_ancestors(operand) for operand in operands]
        whole = [_operands(operand)[0] if _name(operand) == "getitem" else operand for operand in operands]
        if whole[0] in before[1] or whole[1] in before[0]:
            return f"a residual connection {_where(node)}"
        several = len(_sources(_ancestors(node))) > 1
        aside = [operand for operand, past in zip(operands, before) if several and len(_sources(past)) == 1]
        return _explain_branch(aside[0]) if aside else f"a sum of two branches {_where(node)}"
    if name in _SUMS | _PRODUCTS | {"div", "truediv", "neg"}:
        return f"arithmetic with a constant {_where(node)}"
    other = f"an operation other than linear, layer norm and the activations {', '.join(ACTIVATIONS)}"
    return f"{_MEANINGS.get(name, other)} {_where(node)}"


def _explain_branch(node: fx.Node) -> str:
    """Why something computed from inputs is not concatenated with them, or added to layers."""
    past = _ancestors(node)
    sources = _sources(past)
    names = {_name(step): step for step in past}
    of = f"of {' and '.join(sources)} " if sources else ""
    for name in ("sin", "cos", "embedding"):
        if name in names:
            return f"{_MEANINGS[name]} {of}{_where(names[name])}"
    if "linear" in names and len(sources) < 2:
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


def _where(node: fx.Node) -> str:
    return f"({_name(node)}{node.meta['place']})"


def _failure(error: Exception, names: dict[int, str]) -> str:
    """Why the forward could not be followed."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    place = _place(iter(frames), names)
    if place.kind.__module__.startswith("torch.nn.modules") and place.kind not in (nn.Module, *_CONTAINERS):
        return f"nn.{place.kind.__name__}{place._replace(kind=nn.Module)}"
    if isinstance(error, TraceError):
        return f"a step that depends on the values of its inputs{place}"
    first_line = str(error).partition("\n")[0]
    return f"its forward, which cannot be followed{place} ({type(error).__name__}: {first_line[:160]})"


class _Place(NamedTuple):
    """Where a forward is at: the network's innermost module, and the innermost line in one that the user wrote."""

    module: str
    kind: type[nn.Module]
    line: str

    def __str__(self) -> str:
        module = f" in {self.module}" if self.module else ""
        kind = f", {self.kind.__name__}" if module and self.kind is not nn.Module else ""
        return module + kind + (f", at `{self.line}`" if self.line else "")


def _place(frames: Iterator[tuple[Any, int]], names: dict[int, str]) -> _Place:
    module, kind, line = "", nn.Module, ""
    for frame, number in frames:
        if frame.f_code is read_forward.__code__:
            break
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if kind is nn.Module and isinstance(owner, nn.Module) and id(owner) in names:
            module, kind = names[id(owner)], type(owner)
        if not line and id(owner) in names and not file.startswith(_NOT_THE_USERS):
            line = linecache.getline(file, number).strip()
    return _Place(module, kind, line)
