"""Layers on the CPU give PyTorch's results and gradients, whatever the processor."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fdkernels
from fdkernels import torch_private
from fdkernels.cpu import layers as cpu_layers
from fdkernels.policy.critic import TwinCritic
from tests.judge import assert_close, with_gradients
from tests.processors import PROCESSORS, run_as

F64 = torch.float64
gelu = functools.partial(F.gelu, approximate="tanh")


@pytest.fixture(params=PROCESSORS, autouse=True)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    run_as(request.param, monkeypatch)
    return request.param


def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of products that oneDNN computes."""
    shapes: list[tuple[int, ...]] = []

    def onednn_linear(h: Tensor, weight: Tensor, *rest: object) -> Tensor:
        shapes.append((*h.shape, weight.shape[0]))
        return torch_private.onednn_linear(h, weight, *rest)

    monkeypatch.setattr(cpu_layers, "onednn_linear", onednn_linear)
    return shapes


def here(chosen: str) -> bool:
    """Whether this processor takes oneDNN, if PyTorch's build offers the choice."""
    return chosen == "AMD, AVX-512" and torch.backends.mkl.is_available() and torch_private.has_onednn()


def judge(name: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    upstream = torch.randn_like(ours(*(tensor.detach().requires_grad_() for tensor in inputs)).detach())
    found, reference = with_gradients(ours, inputs, upstream), with_gradients(plain, inputs, upstream)
    exact = with_gradients(plain, tuple(tensor.to(F64) for tensor in inputs), upstream)
    for part, out, truth, rounded in zip(("value", "first", "second", "third"), found, exact, reference, strict=False):
        assert out.dtype == torch.float32
        assert_close(f"{name}, {part}", out, truth, rounded, "torch", size=truth)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lies", ["by rows", "by columns", "in a larger one"])
@pytest.mark.parametrize("sizes", [(48, 128, 128), (131, 257, 129), (47, 128, 128), (256, 24, 512), (0, 128, 128)])
def test_linear(sizes: tuple[int, int, int], lies: str, bias: bool) -> None:
    rows, fan_in, fan_out = sizes
    x, b = torch.randn(rows, fan_in), torch.randn(fan_out)

    def weight_of(base: Tensor) -> Tensor:
        return {"by rows": base, "by columns": base.t(), "in a larger one": base[:, 3:]}[lies]

    wide = fan_in + 3 * (lies == "in a larger one")
    base = torch.randn(*((fan_in, fan_out) if lies == "by columns" else (fan_out, wide))) * fan_in**-0.5

    def apply(linear: Callable[..., Tensor], x: Tensor, base: Tensor, b: Tensor | None = None) -> Tensor:
        return linear(x, weight_of(base), b)

    inputs = (x, base, b) if bias else (x, base)
    judge(f"{sizes}", functools.partial(apply, cpu_layers.linear), functools.partial(apply, F.linear), inputs)
    with torch.no_grad():
        exact = F.linear(x.to(F64), weight_of(base).to(F64))
        plain = F.linear(x, weight_of(base))
        assert_close("no gradient", cpu_layers.linear(x, weight_of(base)), exact, plain, "torch", size=exact)


def test_rows_in_any_shape_and_strides() -> None:
    weight = torch.randn(140, 130) * 0.1
    for x in (
        torch.randn(5, 16, 130),
        torch.randn(130, 64).t(),
        torch.randn(1, 130).expand(64, 130),
        torch.randn(64, 150)[:, 7:137],
        torch.randn(2, 3, 130).expand(40, 2, 3, 130),
    ):
        judge(f"{tuple(x.shape)}", cpu_layers.linear, F.linear, (x, weight))
    x = torch.randn(64, 130)

    def summed(linear: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight).sum().expand(1)  # its gradient is one number in memory, expanded

    judge("sum", functools.partial(summed, cpu_layers.linear), functools.partial(summed, F.linear), (x, weight))


def test_biases_as_they_lie() -> None:
    x, weight = torch.randn(64, 130), torch.randn(140, 130) * 0.1
    for bias in (torch.randn(280)[::2], torch.randn(1).expand(140), torch.randn(1), torch.randn(64, 140)):
        judge(f"{tuple(bias.shape)}", cpu_layers.linear, F.linear, (x, weight, bias))


def test_gelu() -> None:
    for h in (torch.randn(64, 130) * 2, torch.randn(2, 70, 100), torch.randn(130, 64).t(), torch.randn(3, 5)):
        judge(f"{tuple(h.shape)}", cpu_layers.gelu_tanh, gelu, (h,))
        given = h.clone()
        with torch.no_grad():
            assert_close("no gradient", cpu_layers.gelu_tanh(h), gelu(h.to(F64)), gelu(h), "torch", size=h)
        assert torch.equal(h, given)
    far = torch.cat([torch.linspace(-3e4, -20, 10_000), torch.linspace(20, 3e4, 10_000)])
    value, gradient = with_gradients(cpu_layers.gelu_tanh, (far,))
    assert torch.equal(value, far.clamp(min=0))
    assert torch.equal(gradient, (far > 0).float())
    assert cpu_layers.gelu_tanh(torch.full((64, 130), torch.nan)).isnan().all()


@pytest.mark.parametrize("function", ["linear", "gelu"])
def test_second_derivatives(function: str) -> None:
    x, weight = torch.randn(64, 130), torch.randn(140, 130) * 0.1

    def slope(linear: Callable[..., Tensor], gelu: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        out = linear(x, weight).square() if function == "linear" else gelu(linear(x, weight))
        return torch.autograd.grad(out.sum(), x, create_graph=True)[0]

    judge(
        function,
        functools.partial(slope, cpu_layers.linear, cpu_layers.gelu_tanh),
        functools.partial(slope, F.linear, gelu),
        (x, weight),
    )


def test_what_is_taken(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = taken(monkeypatch)
    x, weight = torch.randn(64, 130, requires_grad=True), torch.randn(140, 130, requires_grad=True)
    cpu_layers.linear(x, weight).sum().backward()
    # oneDNN is not worth it for the weight's gradient, a sum over only 64 rows
    assert shapes == ([(64, 130, 140), (64, 140, 130)] if here(chosen) else [])
    by_sigmoid = "_GELU" in str(cpu_layers.gelu_tanh(torch.ones(64, 130, requires_grad=True)).grad_fn)
    assert by_sigmoid == (chosen != "Intel, AVX-512")


def test_whoever_wants_plain_functions_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = taken(monkeypatch)
    x, weight = torch.randn(64, 130), torch.randn(140, 130)

    def layer(x: Tensor) -> Tensor:
        return cpu_layers.gelu_tanh(cpu_layers.linear(x, weight))

    plain = gelu(F.linear(x, weight))
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: gelu(F.linear(x, weight)), (x,), (tangent,))[1]
    torch.testing.assert_close(torch.func.vmap(layer)(x.expand(2, -1, -1))[1], plain)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert cpu_layers.linear(x.double(), weight.double()).dtype == F64
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), plain)
    assert shapes == []
    with pytest.raises(RuntimeError):  # raised by PyTorch itself
        cpu_layers.linear(x, weight.t())
    with pytest.raises(RuntimeError):
        cpu_layers.linear(x, weight.double())


def test_compiled_exported_and_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program of PyTorch's own functions serves any number of rows."""
    shapes = taken(monkeypatch)
    net = fdkernels.VelocityMLP(5, 2, (130, 140)).net
    few, many = torch.randn(7, 8), torch.randn(64, 8)
    exported = torch.export.export(net, (few,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    programs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        programs.append(graph)
        return graph

    compiled = torch.compile(lambda rows: net(rows), backend=count, dynamic=True)
    traced = torch.jit.trace(net, many, check_trace=False)  # the check would run it once untraced
    found = [run(rows) for run in (exported, compiled, traced) for rows in (few, many)]
    assert len(programs) == 1
    assert shapes == []
    for out, rows in zip(found, (few, many) * 3, strict=True):
        torch.testing.assert_close(out, net(rows))


def test_gradients_of_several_at_once() -> None:
    x, weight = torch.randn(64, 130, requires_grad=True), torch.randn(140, 130) * 0.1
    upstream = torch.randn(3, 64, 140)

    def gradients(
        linear: Callable[..., Tensor], gelu: Callable[..., Tensor], upstream: Tensor, **options: bool
    ) -> Tensor:
        return torch.autograd.grad(gelu(linear(x, weight)), x, upstream, **options)[0]

    ours = gradients(cpu_layers.linear, cpu_layers.gelu_tanh, upstream, is_grads_batched=True)
    for found, of_one in zip(ours, upstream, strict=True):
        torch.testing.assert_close(found, gradients(F.linear, gelu, of_one))


def test_rows_may_change_where_the_weight_wants_no_gradient() -> None:
    x, weight, bias = torch.randn(64, 130), torch.randn(140, 130), torch.zeros(140, requires_grad=True)
    out = cpu_layers.linear(x, weight, bias)
    x.zero_()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), bias)[0], torch.full((140,), 64.0))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_twin_critics_are_the_batched_ones(chosen: str, layer_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = taken(monkeypatch)
    torch.manual_seed(0)
    critic = TwinCritic(5, 2, (130, 140), layer_norm)
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.1)
    obs, action = torch.randn(64, 5), torch.randn(64, 2, requires_grad=True)

    def found(critic: TwinCritic, obs: Tensor, action: Tensor, frozen: bool) -> list[Tensor]:
        q = critic(obs, action, frozen=frozen)
        inputs = [action] if frozen else [action, *critic.parameters()]
        return [q.detach(), *torch.autograd.grad(q.square().sum(), inputs)]

    for frozen in (False, True):
        shapes.clear()
        ours = found(critic, obs, action, frozen)
        assert bool(shapes) == here(chosen)
        with monkeypatch.context() as on_another:
            on_another.setattr(cpu_layers, "serves", lambda x: False)
            plain = found(critic, obs, action, frozen)
        exact = found(copy.deepcopy(critic).double(), obs.double(), action.detach().double().requires_grad_(), frozen)
        for i, (out, truth, rounded) in enumerate(zip(ours, exact, plain, strict=True)):
            assert_close(f"{i}, frozen={frozen}", out, truth, rounded, "torch", size=truth)


def test_a_velocity_trains_alike(chosen: str) -> None:
    """A velocity trains like a stack of PyTorch's own modules from the same weights."""
    torch.manual_seed(0)
    flow = fdkernels.VelocityMLP(5, 2, (130, 140), layer_norm=True)
    own = torch.nn.Sequential(
        torch.nn.Linear(8, 130), torch.nn.GELU("tanh"), torch.nn.LayerNorm(130, eps=1e-6),
        torch.nn.Linear(130, 140), torch.nn.GELU("tanh"), torch.nn.LayerNorm(140, eps=1e-6),
        torch.nn.Linear(140, 2),
    )  # fmt: skip
    own.load_state_dict(flow.net.state_dict())
    rows = torch.randn(64, 8)

    def gradients(net: torch.nn.Module, rows: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(net(rows).square().mean(), list(net.parameters())))

    exact = gradients(copy.deepcopy(own).double(), rows.double())
    for out, truth, rounded in zip(gradients(flow.net, rows), exact, gradients(own, rows), strict=True):
        assert_close(chosen, out, truth, rounded, "torch", size=truth)
