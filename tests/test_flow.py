"""The flow on the PyTorch path, against the reference in float64, closed forms, and itself in each precision."""

from __future__ import annotations

import copy
import gc
import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fdkernels
import fdkernels_ref
from fdkernels import solvers
from fdkernels.activations import ACTIVATIONS
from fdkernels.cpu import field as cpu_field
from fdkernels.cpu import processor
from tests.closed_forms import anisotropic_gaussian, two_modes
from tests.judge import assert_agree, assert_close
from tests.processors import PROCESSORS, run_as

F64 = torch.float64
METHODS = list(solvers.METHODS)


def stack(
    inputs: int, hidden: Sequence[int], outputs: int, activation: Any, norms: Sequence[str], bias: bool = True
) -> nn.Sequential:
    modules: list[nn.Module] = []
    for width, next_width, norm in zip([inputs, *hidden], hidden, itertools.cycle(norms)):
        modules += [nn.Linear(width, next_width, bias=bias), activation()]
        if norm != "none":
            scale = nn.LayerNorm(next_width)
            nn.init.normal_(scale.weight, 1.0, 0.2)
            nn.init.normal_(scale.bias, 0.0, 0.2)
            modules.insert(len(modules) - (norm == "before"), scale)
    return nn.Sequential(*modules, nn.Linear([inputs, *hidden][-1], outputs, bias=bias))


def as_reference(net: nn.Module, order: Sequence[str]) -> Any:
    def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        inputs = {"x": x, "t": t}
        if cond is not None:
            inputs["cond"] = cond.expand(*x.shape[:-1], cond.shape[-1])
        return net(torch.cat([inputs[name] for name in order], -1))

    return velocity


GRIDS = [None, [0.0, 0.3, 1.0], [1.0, 0.7, 0.1, 0.0], [0.2, 0.5, 0.45, 1.0]]
SOLVERS = st.fixed_dictionaries(
    {
        "num_steps": st.integers(1, 3),
        "method": st.sampled_from(METHODS),
        "time_grid": st.sampled_from(GRIDS),
        "return_path": st.booleans(),
    }
)
CLIPS = st.sampled_from(
    [{}, {"clip": None}, {"clip": (-0.3, 0.5)}, {"clip": (-0.3, 0.5), "clip_each_step": True}, {"clip_each_step": True}]
)
STACKS = st.fixed_dictionaries(
    {
        "hidden": st.lists(st.integers(1, 9), max_size=7),
        "activation": st.sampled_from([row.module for row in ACTIVATIONS.values()]),
        "norms": st.lists(st.sampled_from(["none", "before", "after"]), min_size=1, max_size=3),
        "bias": st.booleans(),
    }
)


@given(
    net=STACKS,
    d=st.integers(1, 5),
    cond_dim=st.integers(0, 4),
    order=st.permutations(["cond", "x", "t"]),
    lead=st.lists(st.integers(0, 3), max_size=3),
    shared=st.sampled_from(["own", "shared", "row"]),
    transposed=st.booleans(),
    options=SOLVERS,
    clip=CLIPS,
)
def test_any_network_and_solver(
    net: dict[str, Any],
    d: int,
    cond_dim: int,
    order: list[str],
    lead: list[int],
    shared: str,
    transposed: bool,
    options: dict[str, Any],
    clip: dict[str, Any],
) -> None:
    order = [name for name in order if cond_dim or name != "cond"]
    module = stack(cond_dim + d + 1, outputs=d, **net).double()
    x0 = torch.randn(*lead, d, dtype=F64)
    cond_lead = {"own": lead, "shared": [*lead[:-1], 1] if lead else [], "row": []}[shared]
    cond = torch.randn(*cond_lead, cond_dim, dtype=F64) if cond_dim else None
    if transposed and lead:
        x0 = x0.mT.contiguous().mT if len(lead) > 1 else x0.repeat(1, 2)[:, ::2].clone().t().contiguous().t()
    theirs = fdkernels_ref.integrate_flow(as_reference(module, order), x0, cond, **options, **clip).detach()
    for velocity in (fdkernels.pack_mlp(module, order), as_reference(module, order)):
        ours = fdkernels.integrate_flow(velocity, x0, cond, **options, **clip)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# -- precision -------------------------------------------------------------------------------------------------------

BROAD = {"plain": ["none"], "before": ["before"], "after": ["after"], "mixed": ["none", "after", "before"]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norms", BROAD)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast", "bfloat16", "float16"])
def test_precision(kind: str, activation: str, norms: str, shared: bool) -> None:
    """float32; bf16 by argument, by autocast and by weights; float16; judged by the reference in the same precision."""
    torch.manual_seed(list(ACTIVATIONS).index(activation))
    net = stack(5 + 3 + 1, (64, 48, 96), 3, ACTIVATIONS[activation].module, BROAD[norms])
    for linear in net:
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
    low = {"float32": torch.float32, "float16": torch.float16}.get(kind, torch.bfloat16)
    stored = low if kind in ("bfloat16", "float16") else torch.float32
    x0, cond = torch.randn(32, 2, 3), torch.randn(32, 1 if shared else 2, 5)
    if kind != "float32":  # the reference must start from the same numbers
        x0, cond = x0.to(low).float(), cond.to(low).float()
        net = net.to(low).float()
    options = {"method": "heun", "num_steps": 4, "clip": None}
    order = ("cond", "x", "t")

    def reference(dtype: torch.dtype) -> Tensor:
        velocity = as_reference(copy.deepcopy(net).to(dtype), order)
        return fdkernels_ref.integrate_flow(velocity, x0.to(dtype), cond.to(dtype), **options).detach()

    packed = fdkernels.pack_mlp(copy.deepcopy(net).to(stored), order)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        ours = fdkernels.integrate_flow(
            packed, x0.to(stored), cond.to(stored), precision="bf16" if kind == "bf16" else None, **options
        )
    assert ours.dtype == stored
    truth = reference(F64)
    assert_close(kind, ours.to(low), truth, reference(low), "torch", size=truth)


def test_where_nobody_differentiates_the_processor_decides() -> None:
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(8, 8)), torch.randn(64, 2), torch.randn(64, 3)
    taken = mock.patch.object(cpu_field, "CpuField", side_effect=cpu_field.CpuField)
    with taken as called:
        for options in ({}, {"precision": "highest"}, {"precision": "high"}, {"precision": "bf16"}):
            fdkernels.integrate_flow(flow, x0, cond, **options)
    assert called.call_count == 4
    with taken as called:
        fdkernels.integrate_flow(flow, x0, cond, differentiable=True)
        torch.func.vmap(lambda x: fdkernels.integrate_flow(flow, x, cond))(x0.expand(2, -1, -1))
        fdkernels.integrate_flow(flow.double(), x0.double(), cond.double())
    assert called.call_count == 0


@pytest.mark.parametrize("chosen", PROCESSORS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_way_on_the_cpu_gives_the_same(activation: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For few rows and many."""
    run_as(chosen, monkeypatch)
    sizes = (
        ((24, 40, 8), False, 3),
        ((24, 24), True, 70),
        ((24,), False, 3),
        ((24, 24), False, 70),
        ((), False, 3),
        ((130, 140, 129), True, 3),
    )
    for (hidden, layer_norm, cond_dim), order in zip(sizes, itertools.permutations(["cond", "x", "t"])):
        flow = fdkernels.VelocityMLP(cond_dim, 2, hidden, activation, layer_norm)
        packed, plain = fdkernels.pack_mlp(flow.net, order), as_reference(flow.net, order)
        exact = as_reference(copy.deepcopy(flow.net).double(), order)
        for rows in (0, 1, 15, 16, 47, 48, 130, 800, 1300):
            x0, cond = torch.randn(rows, 2), torch.randn(rows, cond_dim)
            before = x0.clone()
            out = fdkernels.integrate_flow(packed, x0, cond, num_steps=3, clip=None)
            truth = fdkernels_ref.integrate_flow(exact, x0.double(), cond.double(), num_steps=3, clip=None)
            reference = fdkernels_ref.integrate_flow(plain, x0, cond, num_steps=3, clip=None).detach()
            # with few rows, noise and velocities may nearly cancel
            size = torch.cat([x0, cond], 1)
            assert_close(f"{rows} rows", out, truth.detach(), reference, "torch", size=size)
            assert torch.equal(x0, before)


@pytest.mark.parametrize("chosen", ["Intel, AVX-512", "AMD, AVX2"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_weights_as_they_lie(precision: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stored by columns, and strided or expanded biases, for few rows and many."""
    run_as(chosen, monkeypatch)
    flow, odd = fdkernels.VelocityMLP(3, 2, (130, 140, 129)), fdkernels.VelocityMLP(3, 2, (130, 140, 129))
    for layer, same in zip(flow.net[::2], odd.net[::2]):
        nn.init.normal_(layer.bias)
        same.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        same.bias = nn.Parameter(layer.bias.detach().repeat_interleave(2)[::2])
    nn.init.constant_(flow.net[2].bias, 0.7)
    odd.net[2].bias = nn.Parameter(torch.tensor([0.7]).expand(140))
    for rows in (20, 100, 800, 1300):
        x0, cond = torch.randn(rows, 2), torch.randn(rows, 3)
        truth = fdkernels.integrate_flow(copy.deepcopy(flow).double(), x0.double(), cond.double(), clip=None)
        plain = fdkernels.integrate_flow(flow, x0, cond, clip=None, precision=precision)
        out = fdkernels.integrate_flow(odd, x0, cond, clip=None, precision=precision)
        assert_agree(out, plain, truth, bar=1e-2 if precision else 1e-5)


def test_half_precision_without_units_is_rounded_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with units, but in float32: the plain formula on rounded weights and activations."""
    monkeypatch.setattr(processor, "multiplies", lambda dtype: dtype == torch.float32)
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(32, 32, 32)), torch.randn(64, 2), torch.randn(64, 3)

    def rounded(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        h = torch.cat([cond, x, t], -1)
        for i, module in enumerate(flow.double().net):
            if isinstance(module, torch.nn.Linear) and 0 < i < len(flow.net) - 1:
                h = h.bfloat16().double() @ module.weight.bfloat16().double().T + module.bias.bfloat16().double()
            else:
                h = module(h)
        return h

    for options in ({}, {"differentiable": True}):
        out = fdkernels.integrate_flow(flow.float(), x0, cond, num_steps=1, clip=None, precision="bf16", **options)
        with torch.no_grad():
            truth = fdkernels_ref.integrate_flow(rounded, x0.double(), cond.double(), num_steps=1, clip=None)
        # an operand is rounded the other way if float32 and float64 lie on either side of a tie
        assert (out.detach() - truth).norm() < 1e-4 * truth.norm()
        full = fdkernels.integrate_flow(flow.float(), x0, cond, num_steps=1, clip=None)
        assert (out.detach() - full).norm() > 1e-4 * full.norm()


def test_precisions_differ_where_they_should() -> None:
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(32, 32)), torch.randn(64, 2), torch.randn(64, 3)
    full = fdkernels.integrate_flow(flow, x0, cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fdkernels.integrate_flow(flow, x0, cond, precision="highest"), full)
        automatic = fdkernels.integrate_flow(flow, x0, cond)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(fdkernels.integrate_flow(flow, x0, cond, precision="high"), full)
    low = fdkernels.integrate_flow(flow, x0, cond, precision="bf16")
    assert torch.equal(low, automatic)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    general = fdkernels.integrate_flow(lambda x, t, c: flow(x, t, c), x0, cond, precision="bf16")
    assert general.dtype == torch.float32
    truth = fdkernels_ref.integrate_flow(copy.deepcopy(flow).double(), x0.double(), cond.double())
    assert_agree(general, low, truth, bar=1e-2)
    assert not torch.equal(general, full)
    assert not torch.is_autocast_enabled("cpu")


def test_the_setting_for_float32_is_never_touched() -> None:
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(8,)), torch.randn(4, 2), torch.randn(4, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        fdkernels.integrate_flow(flow, x0, cond)
        fdkernels.integrate_flow(flow, x0, cond, precision="bf16")
        with pytest.raises(RuntimeError, match=r"needs torch.set_float32_matmul_precision\('highest'\), got 'medium'"):
            fdkernels.integrate_flow(flow, x0, cond, precision="highest")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has one setting for all")
def test_the_settings_for_float32_of_each_backend() -> None:
    """PyTorch's getter for all of them raises where they differ. In a process of its own: they cannot be taken back."""
    code = """
import torch, fdkernels
from fdkernels.backend import float32_products
flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(8,)), torch.randn(4, 2), torch.randn(4, 3)
for setting, means in ("tf32", "high"), ("bf16", "medium"), ("ieee", "highest"):
    torch.backends.mkldnn.matmul.fp32_precision = setting
    assert float32_products() == means
    assert fdkernels.integrate_flow(flow, x0, cond).isfinite().all()
assert torch.compile(fdkernels.integrate_flow, backend="eager")(flow, x0, cond).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gaussian", "mixture"])
@pytest.mark.parametrize("backward", [False, True])
def test_order_of_convergence(case: str, backward: bool) -> None:
    # a Gaussian on the cosine path, because on the linear path the midpoint rule would be third order for it
    flow = anisotropic_gaussian(3, path="cosine") if case == "gaussian" else two_modes(2)
    x0 = torch.randn(64, 3 if case == "gaussian" else 2, dtype=F64)
    times = (0.9, 0.0) if backward else (0.0, 0.9)

    def end(steps: int, method: str) -> Tensor:
        grid = torch.linspace(*times, steps + 1, dtype=F64)
        return fdkernels.integrate_flow(flow.velocity, x0, time_grid=grid, method=method, clip=None)

    exact = flow.transport(x0, *times) if case == "gaussian" else end(1024, "rk4")
    for method, order in {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}.items():
        errors = [(end(steps, method) - exact).norm() for steps in (64, 128, 256)]
        for coarse, fine in itertools.pairwise(errors):
            assert torch.log2(coarse / fine).item() == pytest.approx(order, abs=0.2), method


def test_a_mixture_on_the_line_keeps_its_quantiles() -> None:
    mixture = two_modes(1)
    x0 = torch.linspace(-3, 3, 61, dtype=F64)[:, None]
    out = fdkernels.integrate_flow(mixture.velocity, x0, num_steps=100, method="rk4", clip=None)
    cdf = sum(
        w * torch.special.ndtr((out - mode.mean) / mode.covariance.sqrt())
        for w, mode in zip(mixture.weights, mixture.modes)
    )
    torch.testing.assert_close(cdf, torch.special.ndtr(x0), rtol=0, atol=2e-7)


@pytest.mark.parametrize("method", METHODS)
def test_methods_fulfil_the_order_conditions(method: str) -> None:
    stages = solvers.METHODS[method]
    assert sum(stage.weight for stage in stages) == pytest.approx(1)
    for before, stage in itertools.pairwise(stages):
        assert stage.at == before.reach, "a stage lies where the one before it reached"
    if method != "euler":
        assert sum(stage.weight * stage.at for stage in stages) == pytest.approx(1 / 2)
    assert stages[-1].reach == 0


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("kind", ["module", "callable"])
def test_groups_are_separate_calls(kind: str, differentiable: bool, dtype: torch.dtype) -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8, 8)).to(dtype)
    velocity = flow if kind == "module" else (lambda x, t, cond: flow(x, t, cond))
    obs, next_obs = torch.randn(2, 64, 4, dtype=dtype)
    x0s = [torch.randn(64, 3, dtype=dtype), torch.randn(64, 3, dtype=dtype), torch.randn(64, 5, 3, dtype=dtype)]
    conds = [next_obs, obs, obs.unsqueeze(1)]
    options = {"num_steps": 3, "method": "heun", "clip_each_step": True, "differentiable": differentiable}
    together = fdkernels.integrate_flow_groups(velocity, x0s, conds, **options)
    apart = [fdkernels.integrate_flow(velocity, x0, cond, **options) for x0, cond in zip(x0s, conds)]
    exact = copy.deepcopy(flow).double()
    plain = {name: value for name, value in options.items() if name != "differentiable"}
    for ours, theirs, x0, cond in zip(together, apart, x0s, conds):
        spread = cond.expand(*x0.shape[:-1], 4).double()
        assert_agree(ours, theirs, fdkernels_ref.integrate_flow(exact, x0.double(), spread, **plain))
        assert ours.requires_grad == differentiable
    assert fdkernels.integrate_flow_groups(velocity, [], []) == ()


def test_groups_without_condition() -> None:
    flow, x0 = fdkernels.VelocityMLP(0, 3, hidden=(8,)), torch.randn(5, 3)
    (out,) = fdkernels.integrate_flow_groups(flow, (x0,), (None,))
    assert torch.equal(out, fdkernels.integrate_flow(flow, x0))


# -- gradients, transforms, compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["module", "callable"])
def test_gradients_through_the_solver_only_when_asked(kind: str, method: str) -> None:
    flow = fdkernels.VelocityMLP(3, 2, hidden=(8, 8), layer_norm=True).double()
    velocity = flow if kind == "module" else (lambda x, t, cond: flow(x, t, cond))
    x0 = torch.randn(5, 4, 2, dtype=F64, requires_grad=True)
    cond = torch.randn(5, 1, 3, dtype=F64, requires_grad=True)
    options = {"method": method, "num_steps": 3, "clip": (-1.0, 1.0), "clip_each_step": True}
    assert not fdkernels.integrate_flow(velocity, x0, cond, **options).requires_grad
    with torch.no_grad():
        assert not fdkernels.integrate_flow(velocity, x0, cond, differentiable=True, **options).requires_grad
    ours = fdkernels.integrate_flow(velocity, x0, cond, differentiable=True, **options)
    theirs = fdkernels_ref.integrate_flow(lambda x, t, c: flow(x, t, c), x0, cond.expand(5, 4, 3), **options)
    upstream, inputs = torch.randn_like(ours), [x0, cond, *flow.parameters()]
    for mine, other in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def kept_by(call: Any) -> int:
    """Bytes still allocated after the call has returned its result."""
    gc.collect()  # what earlier tests left would count as freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = call()
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def test_memory_grows_by_the_state_alone() -> None:
    flow = fdkernels.VelocityMLP(3, 2, hidden=(256, 256))
    x0, cond = torch.randn(2048, 2), torch.randn(2048, 3)
    few, many = (
        kept_by(lambda steps=steps: fdkernels.integrate_flow(flow, x0, cond, num_steps=steps, differentiable=True))
        for steps in (8, 24)
    )
    state, activation, generator = 4 * x0.numel(), 4 * 2048 * 256, torch.get_rng_state().nbytes
    per_step = (many - few) / 16
    assert state <= per_step < 1.1 * state + generator, f"{per_step} bytes a step, the state has {state}"
    naive = kept_by(lambda: fdkernels_ref.integrate_flow(flow, x0, cond, num_steps=8))
    assert naive > 8 * activation, f"the measure does not see activations: {naive}"


class Sampler(nn.Module):
    def __init__(self, flow: nn.Module, **options: Any) -> None:
        super().__init__()
        self.flow, self.options = flow, options

    def forward(self, x0: Tensor, cond: Tensor) -> Tensor:
        return fdkernels.integrate_flow(self.flow, x0, cond, num_steps=3, **self.options)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_vmap_over_stacked_weights(precision: str | None, layer_norm: bool) -> None:
    samplers = [
        Sampler(fdkernels.VelocityMLP(3, 2, hidden=(16, 16), layer_norm=layer_norm), precision=precision)
        for _ in range(3)
    ]
    weights, buffers = torch.func.stack_module_state(samplers)
    x0, cond = torch.randn(3, 64, 2), torch.randn(3, 64, 3)

    def run(weights: dict[str, Tensor], x0: Tensor, cond: Tensor) -> Tensor:
        return torch.func.functional_call(samplers[0], (weights, buffers), (x0, cond))

    together = torch.func.vmap(run)(weights, x0, cond)
    for i, sampler in enumerate(samplers):
        truth = fdkernels_ref.integrate_flow(
            copy.deepcopy(sampler.flow).double(), x0[i].double(), cond[i].double(), num_steps=3
        )
        assert_agree(together[i], sampler(x0[i], cond[i]), truth, bar=1e-2 if precision else 1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("transform", ["functional_call", "vmap of grad"])
def test_gradients_to_weights_that_are_passed_in(transform: str) -> None:
    """A functional call's weights are in place only during the call, but checkpoints recompute after it."""
    sampler = Sampler(fdkernels.VelocityMLP(3, 2, hidden=(8, 8), layer_norm=True).double(), differentiable=True)
    x0, cond = torch.randn(6, 2, dtype=F64), torch.randn(6, 3, dtype=F64)
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in sampler.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(sampler, weights, (x0, cond)).square().sum()

    other = copy.deepcopy(sampler)
    other.load_state_dict(given)
    fdkernels_ref.integrate_flow(other.flow, x0, cond, num_steps=3).square().sum().backward()
    if transform == "functional_call":
        ours = dict(zip(given, torch.autograd.grad(loss(given), list(given.values()))))
    else:
        stacked = {name: p.detach().expand(2, *p.shape) for name, p in given.items()}
        ours = {name: g[1] for name, g in torch.func.vmap(torch.func.grad(loss))(stacked).items()}
    for name, p in other.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", [None, "bf16", "highest"])
@pytest.mark.parametrize("kind", ["module", "packed", "callable"])
def test_compiles_without_a_graph_break(kind: str, precision: str | None) -> None:
    flow = fdkernels.VelocityMLP(3, 2, hidden=(16, 16))
    velocity = {"module": flow, "packed": fdkernels.pack_mlp(flow), "callable": lambda x, t, c: flow(x, t, c)}[kind]

    def act(x0: Tensor, cond: Tensor) -> Tensor:
        return fdkernels.integrate_flow(velocity, x0, cond, method="heun", num_steps=2, precision=precision)

    x0, cond = torch.randn(64, 2), torch.randn(64, 3)
    torch.compiler.reset()  # every case recompiles the same lines, which dynamo allows eight times
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    exact = copy.deepcopy(flow).double()
    truth = fdkernels_ref.integrate_flow(exact, x0.double(), cond.double(), method="heun", num_steps=2)
    assert_agree(compiled(x0, cond), act(x0, cond), truth, bar=1e-2 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_an_optimiser_step_is_seen_by_the_next_call(precision: str | None) -> None:
    net = stack(3 + 2 + 1, (8, 8), 2, nn.SiLU, ["none"])
    packed = fdkernels.pack_mlp(net)
    x0, cond = torch.randn(64, 2), torch.randn(64, 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        before = fdkernels.integrate_flow(packed, x0, cond, clip=None, precision=precision)
        optimizer.zero_grad()
        net(torch.cat([cond, x0, x0[:, :1]], -1)).square().sum().backward()
        optimizer.step()
        after = fdkernels.integrate_flow(packed, x0, cond, clip=None, precision=precision)
        assert not torch.allclose(after, before)
        fresh = fdkernels.pack_mlp(copy.deepcopy(net))
        assert torch.equal(after, fdkernels.integrate_flow(fresh, x0, cond, clip=None, precision=precision))


def test_a_callable_gets_the_condition_at_its_rows() -> None:
    cond, seen = torch.randn(5, 1, 3), []

    def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.append((tuple(t.shape), tuple(c.shape), t.dtype))
        assert torch.equal(c, cond.expand(5, 4, 3))
        return x

    fdkernels.integrate_flow(velocity, torch.randn(5, 4, 2), cond, num_steps=1)
    assert seen == [((5, 4, 1), (5, 4, 3), torch.float32)]


# -- bad input -------------------------------------------------------------------------------------------------------

X, C = torch.randn(4, 6), torch.randn(4, 5)
FLOW = fdkernels.VelocityMLP(5, 6, hidden=(8,))
WIDE = fdkernels.VelocityMLP(5, 6, hidden=(8,)).double()


def solve(x0: Any = X, cond: Any = C, velocity: Any = FLOW, **options: Any) -> Tensor:
    return fdkernels.integrate_flow(velocity, x0, cond, **options)


def solve_groups(x0s: Any, conds: Any, **options: Any) -> tuple[Tensor, ...]:
    return fdkernels.integrate_flow_groups(FLOW, x0s, conds, **options)


BAD = {
    "no tensor": (lambda: solve([1.0]), TypeError, "x0 must be a torch.Tensor, got list"),
    "scalar": (lambda: solve(torch.tensor(1.0)), ValueError, r"x0 must be \(\.\.\., d\), got \(\)"),
    "scalar cond": (lambda: solve(cond=torch.tensor(1.0)), ValueError, r"cond must be \(\.\.\., c\), got a scalar"),
    "steps": (lambda: solve(num_steps=0), ValueError, "num_steps must"),
    "method": (lambda: solve(method="rk5"), ValueError, "method must be one of 'euler'"),
    "grid": (lambda: solve(time_grid=[0.0]), ValueError, "time_grid must hold two or more"),
    "clip": (lambda: solve(clip=(1, -1)), ValueError, "low <= high"),
    "no bounds": (lambda: solve(clip=None, clip_each_step=True), ValueError, "clip_each_step needs bounds"),
    "cond rows": (lambda: solve(cond=C[:3]), ValueError, r"cond must broadcast .* x0's leading shape = \(4, 5\)"),
    "more cond": (lambda: solve(cond=C.expand(2, 4, 5)), ValueError, r"cond must broadcast .* got \(2, 4, 5\)"),
    "cond width": (lambda: solve(cond=C[:, :4]), ValueError, "width 5, got cond of width 4"),
    "no cond": (lambda: solve(cond=None), ValueError, "width 5, got cond of width 0"),
    "x width": (lambda: solve(X[:, :2]), ValueError, "6 dimensions, got x0 with d=2"),
    "x dtype": (lambda: solve(X.double()), ValueError, "weights are torch.float32, got x0 of torch.float64"),
    "cond dtype": (lambda: solve(cond=C.double()), ValueError, "weights are torch.float32, got cond of torch.float64"),
    "devices": (lambda: solve(cond=C.to("meta")), ValueError, "one device"),
    "velocity": (lambda: solve(velocity="flow"), TypeError, "velocity must be"),
    "its shape": (lambda: solve(velocity=lambda x, t, c: x[:2]), ValueError, "must return x's shape"),
    "precision": (lambda: solve(precision="tf32"), ValueError, "precision must be one of"),
    "bf16 of float64": (lambda: solve(X.double(), C.double(), WIDE, precision="bf16"), ValueError, "less than float64"),
    "high of float64": (
        lambda: solve(X.double(), velocity=lambda x, t, c: x, precision="high"),
        ValueError,
        "precision='high' is less than float64",
    ),
    "triton": (lambda: solve(backend="triton"), RuntimeError, "integrate_flow: backend='triton'"),
    "one tensor": (lambda: solve_groups(X, C), ValueError, "must be sequences of one length"),
    "lengths": (lambda: solve_groups([X], [C, C]), ValueError, "must be sequences of one length"),
    "precision of no group": (lambda: solve_groups([], [], precision=[1.0]), ValueError, "precision must be"),
    "backend of no group": (lambda: solve_groups([], [], backend=0), ValueError, "backend must be"),
    "groups": (lambda: solve_groups([X] * 65537, [C] * 65537), ValueError, "at most 65536 groups, got more"),
    "group's cond": (lambda: solve_groups([X, X], [C, C[:3]]), ValueError, r"conds\[1\] must broadcast"),
    "group's width": (lambda: solve_groups([X, X[:, :2]], [C, C]), ValueError, r"6 dimensions, got x0s\[1\] with d=2"),
    "group's missing cond": (lambda: solve_groups([X, X], [C, None]), ValueError, r"got conds\[1\] of width 0"),
    "group's dtype": (lambda: solve_groups([X, X.double()], [C, C]), ValueError, r"got x0s\[1\] of torch.float64"),
    "group's tensor": (lambda: solve_groups([X, None], [C, C]), TypeError, r"x0s\[1\] must be a torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
