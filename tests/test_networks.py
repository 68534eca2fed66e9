"""Networks as people write them, read in place as velocity fields."""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fdkernels
import fdkernels_ref
from tests import zoo
from tests.judge import assert_agree

F64 = torch.float64


class Wrapped(nn.Module):
    """An actor as people write it, with the stack under other names."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.mean_net = nn.Sequential(nn.Identity(), stack)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean_net(x)


@pytest.mark.parametrize("order", [("cond", "x", "t"), ("x", "t", "cond"), ("t", "cond", "x")])
def test_pack_mlp_reads_what_people_have(order: tuple[str, ...]) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.SiLU(),
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.LayerNorm(8)),
        nn.Linear(8, 2),
    )
    inputs = {"x": torch.randn(4, 2), "t": torch.rand(4, 1), "cond": torch.randn(4, 3)}
    net, inputs = net.double(), {name: tensor.double() for name, tensor in inputs.items()}
    packed = fdkernels.pack_mlp(Wrapped(net), order)
    expected = net(torch.cat([inputs[name] for name in order], dim=-1))
    torch.testing.assert_close(packed(**inputs), expected)
    field = packed.read(torch.float64, torch.float64).field(inputs["cond"])
    torch.testing.assert_close(field(inputs["x"], inputs["t"]), expected)


@pytest.mark.parametrize("name", zoo.READABLE)
def test_forwards_that_are_an_mlp(name: str) -> None:
    """However it is written, the layers found are the module's own, in the order in which it concatenates."""
    kind = zoo.READABLE[name]
    net = kind.make().double().eval()
    packed = fdkernels.pack_mlp(net, kind.order)
    assert packed.order == kind.read
    x0, cond = torch.randn(5, zoo.D, dtype=F64), torch.randn(5, zoo.C, dtype=F64) if "cond" in kind.read else None
    parameters = list(net.parameters())

    def gradients(end: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(end.square().sum(), parameters, materialize_grads=True))

    for step in (0.1, 0.0):  # an optimiser's step on the module is seen
        truth = fdkernels_ref.integrate_flow(functools.partial(kind.call, net), x0, cond, num_steps=3)
        end = fdkernels.integrate_flow(packed, x0, cond, num_steps=3, differentiable=True)
        torch.testing.assert_close(end, truth)
        wanted = gradients(truth)
        torch.testing.assert_close(gradients(end), wanted)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, wanted):
                parameter -= step * gradient
    _, jacobian = fdkernels.flow_jacobian(packed, x0, cond, num_steps=3)
    _, truth = fdkernels_ref.flow_jacobian(functools.partial(kind.call, net), x0, cond, num_steps=3)
    torch.testing.assert_close(jacobian, truth)


def test_chunks() -> None:
    """A network over chunks is one flattened action to the layers, and what it was to the operator."""
    net, (x0, cond) = zoo.Chunks().double(), (torch.randn(5, 2, 1, dtype=F64), torch.randn(5, zoo.C, dtype=F64))
    ends = [fdkernels.integrate_flow(v, x0, cond, event_dim=2) for v in (fdkernels.pack_mlp(net), net)]
    torch.testing.assert_close(ends[0], ends[1])
    truth = fdkernels_ref.integrate_flow(lambda x, t, cond: net(x, t[:, :1], cond), x0, cond)
    torch.testing.assert_close(ends[0], truth)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_class": nn.SiLU},
        {"activation_class": nn.ReLU, "norm_class": nn.LayerNorm, "norm_kwargs": {"normalized_shape": 16}},
    ],
)
def test_torchrl(options: dict) -> None:
    modules = pytest.importorskip("torchrl.modules")
    net = modules.MLP(in_features=6, out_features=2, num_cells=[16, 16], **options)
    packed, rows = fdkernels.pack_mlp(net), (torch.randn(5, 2), torch.rand(5, 1), torch.randn(5, 3))
    torch.testing.assert_close(packed(*rows), net(rows[2], rows[0], rows[1]))


@pytest.mark.parametrize("name", zoo.UNREADABLE)
def test_what_is_not_an_mlp_is_named(name: str) -> None:
    module, part = zoo.UNREADABLE[name]
    with pytest.raises(TypeError, match=part) as caught:
        fdkernels.pack_mlp(module().eval())
    message = str(caught.value)
    assert message.startswith(f"pack_mlp: module {module.__name__} cannot be read as an MLP because of ")
    assert message.endswith("; every operator takes a function v(x, t, cond) that calls the module instead")


class Written(nn.Module):
    """Two layers and a forward as given, on the concatenated inputs."""

    def __init__(self, forward: Callable[[Written, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
        self.written = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs: Tensor) -> Any:
        return self.written(self, inputs)


def in_place(function: Callable[[Tensor], Any]) -> Callable[[Written, Tensor], Tensor]:
    """A forward that changes the hidden layer, and drops what that returns."""

    def forward(self: Written, inputs: Tensor) -> Tensor:
        h = self.first(inputs)
        function(h)
        return self.last(h)

    return forward


def shifted(h: Tensor) -> None:
    h += 0.0


def scaled(h: Tensor) -> None:
    h /= 1.0


def nested(x: Tensor) -> Tensor:
    """More concatenations, one inside the other, than Python's stack holds."""
    for _ in range(2000):
        x = torch.cat([x], -1)
    return x


class Adapted(nn.Linear):
    """A linear layer with another on top, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.more = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Written(in_place(lambda h: h.clamp_(-9, 9))), r"an operation in place whose result is not used \(clamp, at"),
        (Written(in_place(lambda h: h.__setitem__(0, 0.0))), "an operation in place"),
        (Written(in_place(nn.ReLU(inplace=True))), "an operation in place"),
        (Written(lambda self, x: self.last(self.first(x)).clamp(-99, 99)), r"other than linear, .* \(clamp, at"),
        (Written(lambda self, x: self.last(nn.functional.elu(self.first(x)))), r"gelu, silu, relu, tanh \(elu, at"),
        (Written(lambda self, x: self.last(self.first(x).half().float())), "a cast to another dtype"),
        (Written(lambda self, x: self.last(self.first(x).to(torch.ones(1).half()).to(x.dtype))), "a cast to another"),
        (Written(lambda self, x: self.last(self.first(x[: len(x), torch.arange(6)]))), r"a slice \(getitem"),
        (Written(lambda self, x: self.last(self.first(torch.as_tensor(x)))), "depends on the values"),
        (Written(lambda self, x: self.last(torch.cat([self.first(x)[:, :2], x], -1))), "with a hidden layer"),
        (Written(lambda self, x: nn.functional.linear(x, self.first.weight[:2] * x.mean())), "computed weights"),
        (Written(lambda self, x: self.last(self.first(x).detach())), "a stopped gradient"),
        (Written(torch.no_grad()(lambda self, x: self.last(self.first(x)))), "a part without gradients, at"),
        (Written(torch.autocast("cpu")(lambda self, x: self.last(self.first(x)))), "autocast, switched on or off"),
        (Written(torch.autocast("cpu", enabled=False)(lambda self, x: self.last(self.first(x)))), "autocast, switched"),
        (Written(in_place(shifted)), r"an operation in place whose result is not used \(add, at"),
        (Written(in_place(scaled)), r"an operation in place whose result is not used \(div, at"),
        (Written(lambda self, x: self.last(self.first(x.flip(-1)))), r"\(flip, at"),
        (Written(lambda self, x: self.last(self.first(x)[..., :1])), r"a slice \(getitem"),
        (Written(lambda self, x: (self.last(self.first(x)), x)), "what it returns, tuple in place of a tensor"),
        (Written(lambda self, x: torch.zeros(2, 2)), "what it returns, a constant"),
        (Written(lambda self, x: self.last(self.first(x * 1.0 if float(x.sum()) > 0 else x))), "depends on the values"),
        (Written(lambda self, x: self.last(nn.functional.linear(x, torch.ones(8, 6)))), "not those of an nn.Linear"),
        (Written(lambda self, x: self.last(self.norm(self.first(x))), norm=nn.BatchNorm1d(8)), "batch normalisation"),
        (Written(lambda self, x: self.last(self.cell(self.first(x))), cell=nn.GRUCell(8, 8)), "nn.GRUCell in cell"),
        (Written(lambda self, x: self.last(nn.functional.dropout(self.first(x)))), "dropout in training mode"),
        (Written(lambda self, x: self.last(self.first(x)).view(-1, 1, 2)), r"its result is \(2, 1, 2\)"),
        (Written(lambda self, x: self.last(self.first(torch.cat([x, x], 0)))), "along dimension 0"),
        (Written(lambda self, x: self.last(self.first(torch.cat([x, x], -1)))), "concatenate inputs once"),
        (Written(lambda self, x: self.last(self.first(F.layer_norm(x, x.shape[-1:])))), "a layer norm of its inputs"),
        (Written(lambda self, x: self.last(F.layer_norm(h := self.first(x), (h.size(-1) * 1,)))), "a computed size"),
        (Written(lambda self, x: self.last(self.first(nested(x)))), r"a step that is not understood \(cat, at"),
        (Written(lambda self, x: math.nan), "float in place of a tensor"),
        (Adapted(), r"a sum of two branches \(add, at `return super\(\).forward\(x\) \+ self.more"),
        (nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(2, 2)), "a sum of two branches"),
        (nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 2))), "weights that a hook makes at every call"),
        (nn.Sequential(nn.LazyLinear(2)), "weights without a shape yet"),
        (nn.Sequential(nn.Linear(6, 2, device="meta")), "its weights are on meta"),
        (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 2)), r"an RMS norm \(rms_norm in 1, RMSNorm\)"),
        (nn.Sequential(nn.Linear(6, 8), nn.Mish(), nn.Linear(8, 2)), r"\(mish in 1, Mish\)"),
        (nn.Identity(), "a lack of weights"),
    ],
)  # fmt: skip
def test_nothing_is_passed_over(module: nn.Module, message: str) -> None:
    """Not even what two rows would not show, such as wide clips."""
    with pytest.raises(TypeError, match=message):
        fdkernels.pack_mlp(module)


class Interleaved(nn.Module):
    """Chunks of 4 steps, each action next to its step's observation, and a last layer that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4 * (2 + 3) + 1, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 8))
        nn.init.zeros_(self.net[3].weight)
        nn.init.zeros_(self.net[3].bias)

    def forward(self, action: Tensor, obs: Tensor, time: Tensor) -> Tensor:
        steps = torch.cat([action.view(-1, 4, 2), obs.view(-1, 4, 3)], -1)
        return self.net(torch.cat([steps.flatten(1), time], -1))


@pytest.mark.parametrize("zero", ["net.0.weight", "net.2.weight", "net.3.weight"])
def test_a_layer_of_zeros_hides_nothing(zero: str) -> None:
    net = Interleaved()
    net.get_parameter(zero).data.zero_()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(TypeError, match="Interleaved computes something other than the layers found in it"):
        fdkernels.pack_mlp(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.last(F.layer_norm(self.first(x), self.first(x).shape[-1:])),
        lambda self, x: self.last(F.layer_norm(h := self.first(x), (h.size(-1),)).relu()),
        lambda self, x: self.last(F.layer_norm(h := self.first(x).view(-1, 8), h.shape[-1:])),
        lambda self, x: self.last(F.layer_norm(h := self.first(x).view(-1, 8).tanh(), [h.shape[-1]])),
        lambda self, x: self.last(F.layer_norm(h := self.first(x), h.shape[1:], self.norm.weight, self.norm.bias)),
        lambda self, x: self.last(self.first(torch.cat(tensors=[x], dim=-1))),
        lambda self, x: self.last(input=F.silu(input=self.first(input=torch.hstack(tensors=(x,))))),
    ],
)
def test_arguments_in_every_form(forward: Callable[[Written, Tensor], Tensor]) -> None:
    net, rows = Written(forward, norm=nn.LayerNorm(8)), torch.randn(5, 6)
    torch.testing.assert_close(fdkernels.pack_mlp(net).run(rows), net(rows))


def test_hundreds_of_layers() -> None:
    net = nn.Sequential(nn.Linear(6, 8), *[layer for _ in range(600) for layer in (nn.Linear(8, 8), nn.Tanh())])
    net.append(nn.Linear(8, 2))
    assert len(fdkernels.pack_mlp(net).layers) == 602


def test_sizes_may_be_computed_in_place() -> None:
    def forward(self: Written, x: Tensor) -> Tensor:
        h = self.first(x)
        numbers = h.shape[0]
        numbers *= h.shape[1]
        numbers //= 8
        return self.last(h.view(numbers, -1))

    net, rows = Written(forward), torch.randn(5, 6)
    torch.testing.assert_close(fdkernels.pack_mlp(net).run(rows), net(rows))


def test_wrappers_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 2), torch.rand(4, 1), torch.randn(4, 3)
    net, flow = zoo.ByHand(), fdkernels.VelocityMLP(0, 2, hidden=(8,))
    wanted, without = net(rows[2], rows[0], rows[1]), flow(*rows[:2])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        torch.testing.assert_close(fdkernels.pack_mlp(wrapped)(*rows), wanted)
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # on the only GPU there is, it would move the network
    torch.testing.assert_close(fdkernels.pack_mlp(nn.DataParallel(net))(*rows), wanted)
    torch.testing.assert_close(fdkernels.pack_mlp(torch.compile(flow, backend="eager"))(*rows[:2]), without)


def test_an_error_of_the_modules_own_is_shown() -> None:
    class Broken(zoo.ByHand):
        def forward(self, obs: Tensor, action: Tensor, time: Tensor) -> Tensor:
            if isinstance(obs, Tensor):
                raise RuntimeError("the user's own")
            return super().forward(obs, action, time)

    with pytest.raises(TypeError, match=r"cannot be tried out \(RuntimeError: the user's own\)"):
        fdkernels.pack_mlp(Broken())


def test_hooks_are_seen() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    net[2].register_forward_pre_hook(lambda layer, given: (given[0] * 2,))
    with pytest.raises(TypeError, match=r"arithmetic with a constant \(mul in 2, Linear\)"):
        fdkernels.pack_mlp(net)


def test_reading_leaves_the_module_and_other_threads_alone() -> None:
    net = zoo.ByHand()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}, dict(net.named_modules())
    other, results = nn.Linear(3, 3), []

    def meanwhile(*_: object) -> None:
        thread = threading.Thread(target=lambda: results.append(other(torch.ones(3))))
        thread.start()
        thread.join()

    handle = net.l1.register_forward_pre_hook(meanwhile)
    fdkernels.pack_mlp(net)
    handle.remove()
    assert len(results) == 2  # when read, and when tried out
    assert all(type(result) is Tensor for result in results)
    torch.testing.assert_close(net.state_dict(), before[0], rtol=0, atol=0)
    assert dict(net.named_modules()) == before[1]
    assert all(parameter.grad is None for parameter in net.parameters())


class Takes(nn.Module):
    """A forward with these names of arguments."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.net = nn.Linear(6, 2)
        inputs = ", ".join(names)
        self.forward = eval(f"lambda {inputs}: self.net(torch.cat([{inputs}], -1))", {"self": self, "torch": torch})


@pytest.mark.parametrize(
    ("names", "order", "wanted"),
    [
        (("obs", "action", "time"), None, ("cond", "x", "t")),
        (("state", "action", "t"), None, ("cond", "x", "t")),
        (("x", "t", "cond"), None, ("x", "t", "cond")),
        (("timestep", "obs", "u"), None, ("t", "cond", "x")),
        (("x", "a", "t"), ("cond", "x", "t"), ("cond", "x", "t")),
        (("x", "a", "t"), None, "which inputs of module's forward(x, a, t) are x, t and cond"),
        (("x", "t", "s"), None, "which inputs of module's forward(x, t, s) are"),
        (("action", "obs"), None, "which inputs of module's forward(action, obs) are"),
        (("action", "actions", "t"), None, "which inputs of module's forward(action, actions, t) are"),
        (("obs", "goal", "action", "t"), None, "which inputs of module's forward(obs, goal, action, t) are"),
        (
            ("obs", "goal", "action", "t"),
            ("cond", "x", "t"),
            "order must name the inputs of module's forward(obs, goal",
        ),
        (("obs", "action", "time"), ("x", "cond", "t"), "by which 'obs' would be 'x'"),
        (("obs", "action", "time"), ("cond", "t", "x"), "by which 'action' would be 't'"),
    ],
)
def test_which_argument_is_which(names: tuple, order: tuple | None, wanted: tuple | str) -> None:
    net = Takes(*names)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=f"pack_mlp: order must .*{re.escape(wanted.removeprefix('order must '))}"):
            fdkernels.pack_mlp(net, order)
    else:
        assert fdkernels.pack_mlp(net, order).order == wanted


class Penalised(nn.Module):
    """A module around a velocity and its packed form, whose forward is an operator's."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = zoo.Loop().double().eval()
        self.packed = fdkernels.pack_mlp(self.velocity)

    def forward(self, x0: Tensor, cond: Tensor) -> Tensor:
        return fdkernels.integrate_flow(self.packed, x0, cond, num_steps=2, differentiable=True)


def test_many_networks_read_in_place() -> None:
    """Under functional_call and vmap, the packed form computes with the weights that the call puts in."""
    module, (x0, cond) = Penalised(), (torch.randn(4, zoo.D, dtype=F64), torch.randn(4, zoo.C, dtype=F64))
    others = [{name: torch.randn_like(p) / 3 for name, p in module.named_parameters()} for _ in range(2)]
    stacked = {name: torch.stack([other[name] for other in others]) for name in others[0]}
    ends = torch.vmap(lambda weights: torch.func.functional_call(module, weights, (x0, cond)))(stacked)
    for end, weights in zip(ends, others):
        module.load_state_dict(weights)
        torch.testing.assert_close(end, fdkernels_ref.integrate_flow(module.velocity, x0, cond, num_steps=2))


def test_packed_under_torch_compile() -> None:
    module, (x0, cond) = Penalised(), (torch.randn(4, zoo.D, dtype=F64), torch.randn(4, zoo.C, dtype=F64))
    truth = module(x0, cond)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x0, cond), truth)
    # a network compiled by its owner, in either way
    net = zoo.ByHand()
    rows = torch.randn(4, 2), torch.rand(4, 1), torch.randn(4, 3)
    wanted = net(rows[2], rows[0], rows[1])
    torch.testing.assert_close(fdkernels.pack_mlp(torch.compile(net, backend="eager"))(*rows), wanted)
    net.compile(backend="eager")
    torch.testing.assert_close(fdkernels.pack_mlp(net)(*rows), wanted)


def assert_the_module_decides(flow: nn.Module, x0: Tensor, cond: Tensor) -> None:
    exact = copy.deepcopy(flow).double()
    truth = fdkernels_ref.integrate_flow(exact, x0.double(), cond.double())
    plain = fdkernels_ref.integrate_flow(flow, x0, cond)
    assert_agree(fdkernels.integrate_flow(flow, x0, cond), plain, truth)


def test_a_layer_put_in_later_is_seen() -> None:
    """The result of packing is kept only while the module consists of the same layers."""
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(8, 8)), torch.randn(4, 2), torch.randn(4, 3)
    assert fdkernels.pack_mlp(flow) is fdkernels.pack_mlp(flow)
    copied = copy.deepcopy(flow)
    for i, replacement in ((1, nn.Tanh()), (2, nn.Linear(8, 8)), (3, nn.Sequential(nn.ReLU()))):
        flow.net[i] = replacement
        assert_the_module_decides(flow, x0, cond)
    flow.net[3][0] = nn.SiLU()
    flow.net[1] = nn.GELU()
    assert fdkernels.pack_mlp(flow).layers[0].activation == "gelu"
    flow.net[1].approximate = "tanh"
    assert fdkernels.pack_mlp(flow).layers[0].activation == "gelu_tanh"
    dropping = fdkernels.VelocityMLP(3, 2, hidden=(8,))
    dropping.net.insert(1, nn.Dropout().eval())
    fdkernels.pack_mlp(dropping)
    with pytest.raises(TypeError, match="Dropout"):
        fdkernels.pack_mlp(dropping.train())
    assert_the_module_decides(flow, x0, cond)
    assert_the_module_decides(copied, x0, cond)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + super().forward(x)


class Squashed(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.mean_net(x).tanh()


class Doubled(fdkernels.VelocityMLP):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, cond)


def test_a_layer_of_ones_own_is_never_passed_over() -> None:
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(6,)), torch.randn(4, 2), torch.randn(4, 3)
    for other, named in ((Adapted(), "Adapted"), (nn.Sequential(Adapted()), "Adapted"), (Residual(), "Residual")):
        flow.net[2] = other
        with pytest.raises(TypeError, match=f"integrate_flow: velocity's net must be .*, got {named} in it"):
            fdkernels.integrate_flow(flow, x0, cond)


def test_what_a_layer_does_before_its_product_is_done() -> None:
    """Calling a packed module runs the layers themselves, with their hooks and with activations set later."""
    flow, rows = fdkernels.VelocityMLP(3, 2, hidden=(8, 8)), (torch.randn(4, 2), torch.rand(4, 1), torch.randn(4, 3))
    packed = fdkernels.pack_mlp(flow.net)
    before = packed(*rows)
    flow.net[2].register_forward_pre_hook(lambda layer, given: (given[0] * 2,))
    assert not torch.allclose(packed(*rows), before)
    torch.testing.assert_close(packed(*rows), flow(*rows))
    flow.net[1].approximate = "none"
    torch.testing.assert_close(flow.net[1](rows[0]), torch.nn.functional.gelu(rows[0]))
    assert not torch.equal(flow.net[1](rows[0]), torch.nn.functional.gelu(rows[0], approximate="tanh"))


def test_a_forward_of_ones_own_is_never_passed_over() -> None:
    stack = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    for module, part in ((Squashed(stack), "arithmetic with a constant"), (Residual(*stack), "a residual connection")):
        with pytest.raises(TypeError, match=part):
            fdkernels.pack_mlp(module)
    flow, x0, cond = Doubled(3, 2, hidden=(8,)), torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="Doubled cannot be read as an MLP because of arithmetic with a constant"):
        fdkernels.pack_mlp(flow)
    assert_the_module_decides(flow, x0, cond)


def _weight_norm(flow: fdkernels.VelocityMLP) -> None:
    nn.utils.weight_norm(flow.net[0])
    flow.net[0].weight_g.data.mul_(3)


def _prune(flow: fdkernels.VelocityMLP) -> None:
    prune.l1_unstructured(flow.net[0], "weight", 0.5)
    flow.net[0].weight_orig.data.mul_(3)


def _prune_bias(flow: fdkernels.VelocityMLP) -> None:
    prune.random_unstructured(flow.net[2], "bias", 0.5)
    flow.net[2].bias_orig.data.add_(3)


ALTERATIONS: dict[str, tuple[Callable[[fdkernels.VelocityMLP], object], str]] = {
    "weight norm": (_weight_norm, "weights that a hook makes at every call"),
    "pruning": (_prune, "weights that a hook makes at every call"),
    "pruning of a bias": (_prune_bias, "weights that a hook makes at every call"),
    "hook of a layer": (
        lambda flow: flow.net[0].register_forward_hook(lambda m, i, o: 2 * o),
        "arithmetic with a const",
    ),
    "hook of the stack": (
        lambda flow: flow.net.register_forward_hook(lambda m, i, o: 2 * o),
        "arithmetic with a const",
    ),
    "hook before": (lambda flow: flow.net.register_forward_pre_hook(lambda m, i: (2 * i[0],)), "arithmetic with a"),
    "own forward": (lambda flow: setattr(flow, "forward", lambda x, t, cond: x - cond[..., :2]), "a slice"),
    "a layer's": (lambda flow: setattr(flow.net[1], "forward", torch.sin), "sin"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_alters_a_known_network_is_never_passed_over(name: str) -> None:
    """Operators then call it, on the general path, and ``pack_mlp`` says why."""
    alter, part = ALTERATIONS[name]
    flow = fdkernels.VelocityMLP(3, 2, hidden=(8,)).double()
    x0, cond = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    before = fdkernels.integrate_flow(flow, x0, cond)
    alter(flow)
    truth = fdkernels_ref.integrate_flow(flow, x0, cond)
    assert not torch.allclose(truth, before)
    torch.testing.assert_close(fdkernels.integrate_flow(flow, x0, cond), truth)
    if name == "hook of a layer":
        compiled = torch.compile(fdkernels.integrate_flow, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(flow, x0, cond), truth)
    with pytest.raises(TypeError, match=f"module VelocityMLP cannot be read as an MLP because of .*{part}"):
        fdkernels.pack_mlp(flow)


def test_a_hook_that_only_looks_on_is_run() -> None:
    flow, x0 = fdkernels.VelocityMLP(0, 2, hidden=(8,)), torch.randn(4, 2)
    packed, seen = fdkernels.pack_mlp(flow), []
    handles = [
        flow.net[0].register_forward_hook(lambda layer, given, out: seen.append("forward")),
        flow.net[2].register_full_backward_hook(lambda layer, *gradients: seen.append("backward")),
    ]
    end = fdkernels.integrate_flow(flow, x0, num_steps=3, differentiable=True)
    end.sum().backward()
    assert set(seen) == {"forward", "backward"}
    torch.testing.assert_close(end, fdkernels.integrate_flow(packed, x0, num_steps=3))
    handles.pop().remove()
    assert fdkernels.pack_mlp(flow).order == ("x", "t")
    handles.pop().remove()
    assert fdkernels.pack_mlp(flow) is packed


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)), "Softmax"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(9, 2)), "widths do not chain"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), "begin and end"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 2)), "at most norm, activation, norm"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(4), nn.Linear(8, 2)), "must normalise"),
        (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), "must take"),
        (nn.Bilinear(2, 2, 2), "order must say which inputs of module's forward"),
    ],
)
def test_pack_mlp_refuses_the_rest(module: nn.Module, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fdkernels.pack_mlp(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fdkernels.VelocityMLP(-1, 2), "cond_dim must be an integer of at least 0"),
        (lambda: fdkernels.VelocityMLP(1, 2, activation="unheard of"), "activation must be one of"),
        (lambda: fdkernels.pack_mlp(fdkernels.VelocityMLP(5, 6, hidden=(8,)).net, ("cond", "x")), "order must name"),
    ],
)
def test_bad_settings(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
