"""Modules run on symbols instead of tensors, which shows what they compute.

The symbols are ``torch.fx`` proxies. ``torch.fx.symbolic_trace`` itself would not do: it patches every module of the
process while it runs, so that other threads would be traced too, and it stops at the shapes and devices that forwards
ask their inputs for. Here modules run as they are, hooks and parametrisations included.
"""

from __future__ import annotations

import contextlib
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError

from fdkernels.backend import autocast_enabled
from fdkernels.torch_private import autocast_depth

ROWS = 2
"""A symbol stands for a tensor (ROWS, width) of unknown width, until it is reshaped."""
RESHAPES = {
    "contiguous", "clone", "expand", "expand_as", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
    "squeeze", "unsqueeze", "atleast_2d",
}  # fmt: skip
SIZES = {"size", "dim", "numel", "getattr"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NOT_THE_USERS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


class UnreadableError(Exception):
    """What a forward has and a stack of layers has not, in words."""


def run_on_symbols(module: nn.Module, inputs: Sequence[str], call: Callable[..., Any]) -> fx.Node:
    """The graph of what the module computes, from its output on.

    A node's ``meta`` has the "place" in the forward where it was made, and the "dtype" of the weights.

    Args:
        inputs: names for the inputs, which become the targets of the placeholders.
        call: calls the module with one symbol for each of them.

    Raises:
        UnreadableError: the forward does not run on symbols, or does not return one.
    """
    weights = [p for p in module.parameters() if p.is_floating_point()]
    if not weights:
        raise UnreadableError("a lack of weights")
    tracer = _Tracer(module, weights[0])
    symbols = [tracer.create_proxy("placeholder", name, (), {}) for name in inputs]
    try:
        with torch.enable_grad(), uncompiled():
            out = call(*symbols)
    except UnreadableError:
        raise
    except Exception as error:  # whatever a custom forward raises
        raise UnreadableError(_failure(error, tracer.names)) from error
    if not isinstance(out, fx.Proxy):
        kind = "a constant" if isinstance(out, Tensor) else f"{type(out).__name__} in place of a tensor"
        raise UnreadableError(f"what it returns, {kind}")
    return out.node


def operation(node: fx.Node) -> str:
    """Its name without regard to how it was written: ``F.relu``, ``torch.relu_`` and ``h.relu()`` are "relu"."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name if node.op == "placeholder" else name.rstrip("_")


def is_size(node: fx.Node) -> bool:
    """Whether it is a number that tells a shape, or made of such numbers, rather than a tensor."""
    return node.meta["size"]


def uncompiled() -> contextlib.AbstractContextManager:
    """Modules run as they are written, without the compiler, if it was ever loaded."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Tracer(GraphAppendingTracer):
    def __init__(self, module: nn.Module, like: Tensor) -> None:
        super().__init__(fx.Graph())
        self.names = {id(child): name for name, child in module.named_modules()}
        self.device, self.dtype = like.device, like.dtype
        self.autocast = self._autocast()

    def _autocast(self) -> tuple[int, bool]:
        """Where this is among autocasts. One that changes nothing now may do so in a later call."""
        return autocast_depth(), autocast_enabled(self.device.type)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        node.meta["dtype"] = self.dtype
        node.meta["place"] = place = _place(traceback.walk_stack(None), self.names)
        if kind != "placeholder" and not torch.is_grad_enabled():
            raise UnreadableError(f"a part without gradients{place}")
        if self._autocast() != self.autocast:
            raise UnreadableError(f"autocast, switched on or off by its forward{place}")
        made_of_sizes = bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))
        node.meta["size"] = kind != "placeholder" and (operation(node) in SIZES or made_of_sizes)
        made_of_rows = all(operand.meta["rows"] for operand in node.all_input_nodes)
        node.meta["rows"] = made_of_rows and operation(node) not in RESHAPES | SIZES | {"getitem"}
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Width(node, self) if operation(node) == "size" and node.args[1:] == (-1,) else _Symbol(node, self)


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

    def __iadd__(self, other: Any) -> Any:
        return self._write("add_", other)

    def __isub__(self, other: Any) -> Any:
        return self._write("sub_", other)

    def __imul__(self, other: Any) -> Any:
        return self._write("mul_", other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write("div_", other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._write("floor_divide_", other)

    def __imod__(self, other: Any) -> Any:
        return self._write("remainder_", other)

    def __ipow__(self, other: Any) -> Any:
        return self._write("pow_", other)

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

    def __len__(self) -> int:
        if not self.node.meta["rows"]:
            raise TraceError("a number is asked for")
        return ROWS

    def numel(self) -> int:
        return ROWS  # few enough for cpu/layers.py to choose PyTorch's own functions

    def _write(self, method: str, other: Any) -> Any:
        """What an assignment such as ``h += 1`` does: it changes a tensor, but gives a size another value."""
        return NotImplemented if is_size(self.node) else self._ask(method, other)

    def _ask(self, method: str, *args: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", method, (self, *args), {})


class _Width(_Symbol):
    """The width of an input. Forwards compare it with what they expect, and the trial shows whether it is that."""

    __hash__ = fx.Proxy.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


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
        if frame.f_code is run_on_symbols.__code__:
            break
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if kind is nn.Module and isinstance(owner, nn.Module) and id(owner) in names:
            module, kind = names[id(owner)], type(owner)
        if not line and id(owner) in names and not file.startswith(_NOT_THE_USERS):
            line = linecache.getline(file, number).strip()
    return _Place(module, kind, line)
