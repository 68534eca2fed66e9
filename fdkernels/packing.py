"""Networks as people have them, packed: their layers found, checked and tried out. Weights are never copied."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fdkernels.activations import ACTIVATIONS, name_of
from fdkernels.backend import autocast
from fdkernels.forwards import Leaf, read_forward, steady_weights
from fdkernels.layers import Input
from fdkernels.networks import LayerModules, Linear, PackedMLP, VelocityMLP
from fdkernels.symbols import UnreadableError, uncompiled
from fdkernels.torch_private import runs_forwards_alone
from fdkernels.validation import FLOATING, brief, is_sequence


def pack_mlp(module: nn.Module, order: Sequence[Input] | None = None) -> PackedMLP:
    """Use an existing MLP as a velocity field, in place.

    Nothing is copied: the next call sees an optimiser step on ``module``. What counts is what the module's ``forward``
    does, not how it is written or what its attributes are called. It is read by running it once on symbols, and must be
    a concatenation of the inputs, then linear maps (``nn.Linear``), activations (those of
    ``fdkernels.activations.ACTIVATIONS``, as modules, functions or methods) and layer norms, of which an activation has
    at most one on either side. Reshapes that keep rows as they are, ``nn.Identity``, and dropout in eval mode are
    passed over. The result is then tried out on two rows, with random weights, against the module's own call.
    docs/networks.md has examples.

    Args:
        module: a module whose ``forward`` takes the concatenated inputs, as an ``nn.Sequential`` does, or takes x, t
            and the condition as separate arguments, times as (..., 1) or (...).
        order: for a module of one argument, the order in which the inputs are concatenated; ``None`` stands for
            ``("cond", "x", "t")``. For one of several arguments, what these are in turn: ``("cond", "x", "t")`` for
            ``forward(obs, action, time)``, in whatever order it concatenates them. ``None`` goes by names such as
            "action", "time" and "obs", and is refused where these leave a doubt. Leave ``"cond"`` out for an
            unconditional flow. Ignored for a :class:`VelocityMLP`, which knows its own.

    Returns:
        The packed MLP, callable as v(x, t, cond) and accepted wherever a velocity is.

    Raises:
        TypeError: the module computes anything else. The message names the part. Operators take such a module too, as
            a callable v(x, t, cond).
        ValueError: widths do not chain, weights are on several devices, or ``order`` does not fit the module.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(module).__name__}")
    module = _unwrapped(module)
    if is_known(module):
        return pack_known(what, module)
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise TypeError(f"{what} {type(module).__name__} has weights without a shape yet; call it once first")
    if isinstance(module, VelocityMLP) and type(module).forward is VelocityMLP.forward:
        order = ("x", "t", "cond") if "cond" in module.order else ("x", "t")  # its arguments
    names = None if order is None else _check_order(order)
    arguments = _arguments(module)
    if arguments is None:
        return _read(module, None, names or ("cond", "x", "t"))
    roles = _roles(arguments, names)
    return _read(module, roles, tuple(roles.values()))


_ORDERS = (*itertools.permutations(("cond", "x", "t")), *itertools.permutations(("x", "t")))
_NAMES: dict[str, Input] = {
    **dict.fromkeys(("t", "time", "times", "timestep", "timesteps"), "t"),
    **dict.fromkeys(("x_t", "xt", "act", "action", "actions", "noisy_action", "noisy_actions"), "x"),
    **dict.fromkeys(("cond", "condition", "obs", "observation", "observations"), "cond"),
}
"""Names of arguments that leave no doubt. "x" is none: some call the action so, others the observation."""
_INSTEAD = "every operator takes a function v(x, t, cond) that calls the module instead"


def _check_order(order: Sequence[Input]) -> tuple[Input, ...]:
    names = tuple(itertools.islice(order, 4)) if is_sequence(order) else ()
    if not all(isinstance(name, str) for name in names) or names not in _ORDERS:
        raise ValueError(
            f"pack_mlp: order must name 'x', 't' and, unless unconditional, 'cond' once, got {brief(order)}"
        )
    return names


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that compute the same, such as that of ``torch.compile``."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _arguments(module: nn.Module) -> list[inspect.Parameter] | None:
    """The arguments of ``forward`` that have names; None if it takes one, or any number, which may be one."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # not a Python function
        return None
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named if sum(p.default is p.empty for p in named) > 1 else None


def _roles(arguments: list[inspect.Parameter], order: tuple[Input, ...] | None) -> dict[str, Input]:
    """What the arguments are: x, t or the condition."""
    forward = f"forward({', '.join(p.name for p in arguments)})"
    required = [p.name for p in arguments if p.default is p.empty]
    clear = {p.name: _NAMES[p.name] for p in arguments if p.name in _NAMES}
    if order is not None:
        if not len(required) <= len(order) <= len(arguments):
            raise ValueError(f"pack_mlp: order must name the inputs of module's {forward} in turn, got {order}")
        roles = dict(zip((p.name for p in arguments), order))
        for name, role in roles.items():
            if clear.get(name, role) != role:
                raise ValueError(
                    f"pack_mlp: order must name the inputs of module's {forward} in turn, got {order}, by which "
                    f"{name!r} would be {role!r}"
                )
        return roles
    needed: list[Input] = ["x", "t"]
    if "cond" in clear.values() or len(required) > 2:
        needed.append("cond")
    unknown = [name for name in required if name not in clear]
    missing = [role for role in needed if role not in clear.values()]
    if len(unknown) == len(missing) == 1:
        clear[unknown.pop()] = missing.pop()
    if unknown or missing or len(clear) > len(needed):
        raise ValueError(
            f"pack_mlp: order must say which inputs of module's {forward} are x, t and cond in turn, such as "
            "order=('cond', 'x', 't'); their names leave it open"
        )
    return {p.name: clear[p.name] for p in arguments if p.name in clear}


def _read(module: nn.Module, roles: dict[str, Input] | None, order: tuple[Input, ...]) -> PackedMLP:
    """Pack the layers in the module's forward.

    Args:
        roles: the inputs by the names of the arguments; None if the only argument is all of them, concatenated in
            ``order``.
    """
    what, kind = "pack_mlp: module", type(module).__name__

    def call(*inputs: Any) -> Any:
        return module(*inputs) if roles is None else module(**dict(zip(roles, inputs)))

    inputs = ("inputs",) if roles is None else order
    with steady_weights(module):
        try:
            forward = read_forward(module, inputs, call)
        except UnreadableError as unreadable:
            raise TypeError(
                f"{what} {kind} cannot be read as an MLP because of {unreadable}; {_INSTEAD}"
            ) from unreadable.__cause__
        if sorted(forward.inputs) != sorted(inputs):
            raise TypeError(f"{what} {kind} must concatenate {_listed(inputs)} once, got {_listed(forward.inputs)}")
        packed = _stack(what, forward.leaves, order if roles is None else forward.inputs)  # type: ignore[arg-type]
        if packed.device.type == "meta":
            raise TypeError(f"{what} {kind} cannot be tried out: its weights are on meta, without numbers")
        _try_out(f"{what} {kind}", packed, call, None if roles is None else order)
    return packed


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], PackedMLP]] = weakref.WeakKeyDictionary()


def is_known(module: object) -> TypeGuard[VelocityMLP]:
    """Whether it is a VelocityMLP whose call runs its own forward and its layers' and nothing else, such as a hook."""
    if not isinstance(module, VelocityMLP) or type(module).forward is not VelocityMLP.forward:
        return False
    try:
        return runs_forwards_alone(module)
    except RecursionError:  # which packing refuses
        return True


def pack_known(what: str, module: VelocityMLP) -> PackedMLP:
    """Packing takes half as long as a launch, so the result is kept until the module changes.

    Args:
        what: the operator and the argument, for messages.
    """
    stack = module.net
    if torch.compiler.is_compiling() or not isinstance(stack, nn.Sequential):
        return _pack_children(what, stack, module.order)
    # vars, because a module answers slowly that it lacks an attribute
    settings = [(layer.training, vars(layer).get("approximate")) for layer in stack]
    made_of = (*module.order, *stack, *settings)
    before, packed = _known.get(module, ((), None))
    if packed is None or made_of != before:
        packed = _pack_children(what, stack, module.order)
        if all(next(layer.children(), None) is None for layer in stack):  # changes further down would go unnoticed
            _known[module] = made_of, packed
    return packed


def _pack_children(what: str, module: nn.Module, order: Sequence[Input]) -> PackedMLP:
    """Pack a stack whose forward is known: one child after the other. Unlike reading a forward, this compiles."""
    try:
        leaves = list(_leaves(what, module))
    except RecursionError:
        raise TypeError(f"{what} must not contain itself") from None
    return _stack(what, leaves, order)


_KNOWN_FORWARDS = (Linear.forward, nn.Linear.forward, nn.LayerNorm.forward)


def _leaves(what: str, module: nn.Module) -> Iterator[Leaf]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child in module:
            yield from _leaves(what, child)
    elif type(module) is nn.Identity or (type(module) is nn.Dropout and not module.training):
        return
    elif (activation := name_of(module)) is not None:
        yield activation
    elif isinstance(module, (nn.Linear, nn.LayerNorm)) and type(module).forward in _KNOWN_FORWARDS:
        yield module
    else:
        raise TypeError(
            f"{what}'s net must be an nn.Sequential of Linear, activation ({', '.join(ACTIVATIONS)}) and LayerNorm, "
            f"got {type(module).__name__} in it; {_INSTEAD}"
        )


def _stack(what: str, leaves: list[Leaf], order: Sequence[Input]) -> PackedMLP:
    """The packed MLP of these parts, checked."""
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


def _layers(what: str, leaves: list[Leaf]) -> Iterator[LayerModules]:
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
        activation = rest[kinds.index("a")] if "a" in kinds else None
        yield LayerModules(linear, before, activation, after)  # type: ignore[arg-type]


def _call_either(call: Callable[..., Any], first: list[Tensor], second: list[Tensor]) -> Any:
    """The result with the first arguments, or else with the second, if there are any."""
    try:
        return call(*first)
    except Exception:
        if second:
            with contextlib.suppress(Exception):
                return call(*second)
        raise


class _OtherWeights(TorchFunctionMode):
    """Functions of PyTorch take random numbers in place of the layers' weights, in this thread and until it is left.

    With the weights as they are, a network whose last layer is zero would tell nothing of the layers before it.
    """

    def __init__(self, packed: PackedMLP) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(0)
        self.others: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in packed.layers:
            modules = [module for module in (layer.linear, layer.norm_before, layer.norm_after) if module]
            for part in (part for module in modules for part in (module.weight, module.bias)):
                if part is not None and id(part) not in self.others:
                    # so that values keep their size from layer to layer
                    most = (6 / max(part.shape[1], 1)) ** 0.5 if part.ndim == 2 else 1.0
                    other = torch.empty(part.shape, device="cpu").uniform_(-most, most, generator=generator)
                    self.others[id(part)] = part, other.to(part)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def other(given: Any) -> Any:
            return self.others.get(id(given), (given, given))[1]

        return function(*map(other, args), **{name: other(given) for name, given in (kwargs or {}).items()})


@torch.no_grad()
def _try_out(what: str, packed: PackedMLP, call: Callable[..., Any], arguments: tuple[Input, ...] | None) -> None:
    """Check that the module's call computes what operators compute of the layers found in it, with other weights."""
    width = packed.layers[0].linear.in_features
    rows = torch.linspace(-1, 1, 2 * width, dtype=packed.dtype, device=packed.device).view(2, width)
    widths = {"x": packed.action_dim, "t": 1, "cond": packed.cond_dim}
    columns = dict(zip(packed.order, rows.split([widths[name] for name in packed.order], dim=1)))
    given = [rows] if arguments is None else [columns[name] for name in arguments]
    # it may want times (...) instead of (..., 1)
    flat = [tensor.squeeze(1) if name == "t" else tensor for name, tensor in zip(arguments or (), given)]
    try:
        with autocast(packed.device, None), uncompiled(), _OtherWeights(packed):
            h = rows
            for modules in packed.layers:
                layer = modules.read()
                h = layer.finish(F.linear(h, layer.weight, layer.bias))
            out = _call_either(call, given, flat)
            if out.shape != h.shape:
                raise ValueError(f"its result is {tuple(out.shape)} instead of {tuple(h.shape)}")
            same = torch.allclose(out, h, rtol=1e-3, atol=1e-5, equal_nan=True)
    except Exception as error:  # whatever a custom forward raises
        raise TypeError(f"{what} cannot be tried out ({type(error).__name__}: {error}); {_INSTEAD}") from error
    if not same:
        raise TypeError(f"{what} computes something other than the layers found in it; {_INSTEAD}")
