"""The fused flow against the plain maths in float64: integration, and the chain to penalty and gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from fdkernels.activations import ACTIVATIONS
from fdkernels.kernels.flow import timetable
from fdkernels.layers import encode
from fdkernels.networks import PackedMLP
from fdkernels.ops import integrate as integrate_op
from fdkernels.ops.register import Layout
from fdkernels.philox import philox_normal
from fdkernels.records import Chain, Noise, PenaltyRule, TimedAffine, Way
from fdkernels.solvers import METHODS, Solver
from fdkernels_ref.paths import path_of
from tests import zoo
from tests.judge import BARS, assert_agree
from tests.kernels.device import COMPILERS, DEVICE, INTERPRETED, guarded, on_gpu
from tests.kernels.together import programs_together

HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
IMPLEMENTATIONS = ("streamed", "gemm", *(("stationary",) if INTERPRETED or HOPPER else ()))
# Allowed errors by precision of the products, as ‖error‖/‖truth‖ with a truth in float64.
# Stationary networks do not fit in "highest".
PRECISIONS = {"highest": 1e-5, "high": 1e-3, "bf16": 1e-2}
long = pytest.mark.long("another one of its kind")
MOST_EXACT = {"streamed": "highest", "gemm": "highest", "stationary": "high"}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def network(
    cond_dim: int,
    d: int,
    hidden: tuple[int, ...],
    activation: str = "gelu_tanh",
    norm: str = "none",
    order: tuple[str, ...] = ("cond", "x", "t"),
    seed: int = 0,
) -> PackedMLP:
    """A packed stack with biases and norms unlike a fresh one's."""
    torch.manual_seed(seed)
    width, modules = cond_dim + d + 1, []
    for i, next_width in enumerate(hidden):
        modules.append(nn.Linear(width, next_width, bias=i != 1))
        layer = [ACTIVATIONS[activation].module()] if activation != "none" else []
        layer.insert(len(layer) if norm == "after" else 0, nn.LayerNorm(next_width, elementwise_affine=i != 1))
        modules += layer if norm != "none" else layer[1:]
        width = next_width
    modules.append(nn.Linear(width, d))
    stack = nn.Sequential(*modules)
    for parameter in stack.parameters():  # as large as the fresh weights at any width
        parameter.data += 0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return fdkernels.pack_mlp(stack.to(DEVICE), order if cond_dim else tuple(n for n in order if n != "cond"))


def in_double(velocity: PackedMLP | nn.Module) -> Any:
    if isinstance(velocity, nn.Module):
        return copy.deepcopy(velocity).double().cpu()
    return mlp_on(velocity, torch.device("cpu"), torch.float64)


def mlp_on(mlp: PackedMLP, device: torch.device, dtype: torch.dtype) -> PackedMLP:
    copied = copy.deepcopy(mlp)
    for layer in copied.layers:
        for module in (layer.linear, layer.norm_before, layer.norm_after):
            if module is not None:
                module.to(device, dtype)
    return copied


@contextlib.contextmanager
def at_once(implementation: str, precision: str = "high") -> Iterator[None]:
    """Let programs that wait for one another run together, as on a GPU, and set the precision of library products."""
    before = torch.get_float32_matmul_precision()
    if implementation == "gemm" and precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
    try:
        with programs_together() if INTERPRETED and implementation == "stationary" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative(out: Tensor, truth: Tensor) -> float:
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, wanted {tuple(truth.shape)}"
    assert not out.isnan().any(), "NaN: unwritten output, or read beyond an input"
    return ((out.double().cpu() - truth).norm() / truth.norm().clamp(min=1e-300)).item() if truth.numel() else 0.0


def true_end(velocity: PackedMLP | nn.Module, x0: Tensor, cond: Tensor, **options: Any) -> Tensor:
    """The plain maths in float64."""
    x0, cond = x0.double().cpu(), cond.double().cpu()
    return fdkernels_ref.integrate_flow(in_double(velocity), x0, cond.expand(*x0.shape[:-1], -1), **options).detach()


def true_penalty(
    velocity: PackedMLP | nn.Module, cond: Tensor, displacement: Tensor, noise: Tensor, bridge: Tensor
) -> tuple[Tensor, Tensor]:
    """The penalty and the gradient of its sum with respect to δ, by the plain maths in float64 in two steps."""
    leaf = displacement.detach().double().cpu().requires_grad_()
    draws = {"noise": noise.double().cpu(), "bridge_noise": bridge.double().cpu(), "num_samples": noise.shape[-2]}
    penalty = fdkernels_ref.flow_fisher_penalty(in_double(velocity), cond.double().cpu(), leaf, **draws, num_steps=2)
    return penalty.detach(), torch.autograd.grad(penalty.sum(), leaf)[0]


def judge_flow(
    mlp: PackedMLP, x0: Tensor, cond: Tensor | None, implementation: str, precision: str | None = None, **options: Any
) -> None:
    precision = precision or MOST_EXACT[implementation]
    with at_once(implementation, precision):
        out = fdkernels.integrate_flow(
            mlp, guarded(x0), None if cond is None else guarded(cond),
            implementation=implementation, precision=precision, **options,
        )  # fmt: skip
    spread = None if cond is None else cond.double().expand(*x0.shape[:-1], cond.shape[-1])
    truth = fdkernels_ref.integrate_flow(in_double(mlp), x0.double(), spread, **options)
    assert relative(out, truth) < PRECISIONS[precision]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows", "cond_dim", "d", "hidden"),
    [
        ((40 if INTERPRETED else 100,), 17, 6, (64, 64, 64, 64)),
        ((1,), 17, 6, (64, 64)),
        ((3, 7), 29, 8, (32, 32)),
        ((37,), 0, 1, (32, 32)),
        ((20,), 40, 64, (64, 64, 64)),
        *(
            []
            if INTERPRETED
            else [((1000,), 17, 6, (512,) * 4), ((70,), 300, 21, (1024,) * 3), ((33,), 5, 2, (256,) * 8)]
        ),
    ],
    ids=str,
)
def test_sizes(rows: tuple[int, ...], cond_dim: int, d: int, hidden: tuple[int, ...], implementation: str) -> None:
    mlp = network(cond_dim, d, hidden)
    judge_flow(mlp, draw(*rows, d), draw(*rows, cond_dim) if cond_dim else None, implementation, num_steps=5)


@on_gpu
@pytest.mark.parametrize("precision", ["high", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_precisions_at_the_published_size(implementation: str, precision: str) -> None:
    """256 rows and 10 steps; the chain has four samples for each of 64 states."""
    mlp = network(17, 6, (512,) * 4)
    judge_flow(mlp, draw(256, 6), draw(256, 17), implementation, precision, num_steps=10)
    judge_chain(mlp, (64,), 4, implementation, precision)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_and_grids(method: str, implementation: str) -> None:
    mlp, x0, cond = network(5, 3, (32, 32)), draw(19, 3), draw(19, 5)
    judge = functools.partial(judge_flow, mlp, x0, cond, implementation, method=method)
    judge(num_steps=2)
    judge(time_grid=[1.0, 0.7, 0.0], clip=None, return_path=True)
    judge(time_grid=[0.0, 0.5, 0.9, 1.0], clip=(-0.2, 0.3), clip_each_step=True, return_path=True)


@settings(max_examples=min(20, settings().max_examples))
@given(
    lead=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    cond_dim=st.integers(0, 40),
    d=st.integers(1, 20),
    hidden=st.lists(st.integers(1, 80), min_size=1, max_size=8).map(tuple),
    activation=st.sampled_from(["gelu_tanh", "gelu", "silu", "relu", "tanh", "none"]),
    norm=st.sampled_from(["none", "before", "after"]),
    order=st.permutations(["cond", "x", "t"]).map(tuple),
    method=st.sampled_from(sorted(METHODS)),
    clip=st.sampled_from([None, (-1.0, 1.0), (-0.1, 0.5)]),
    each_step=st.booleans(),
    path=st.booleans(),
    shared=st.booleans(),
    implementation=st.sampled_from(["streamed", "gemm"]),
)
def test_any_network(
    lead: tuple[int, ...], cond_dim: int, d: int, hidden: tuple[int, ...], activation: str, norm: str,
    order: tuple[str, ...], method: str, clip: tuple[float, float] | None, each_step: bool, path: bool, shared: bool,
    implementation: str,
) -> None:  # fmt: skip
    if norm != "none" and 1 in hidden:
        hidden = tuple(max(2, width) for width in hidden)  # normalising one number is zero over zero
    mlp = network(cond_dim, d, hidden, activation, norm, order)
    cond_lead = (*lead[:-1], 1) if shared and lead else lead
    judge_flow(
        mlp, draw(*lead, d), draw(*cond_lead, cond_dim) if cond_dim else None, implementation,
        num_steps=2, method=method, clip=clip, clip_each_step=each_step and clip is not None, return_path=path,
    )  # fmt: skip


def judge_chain(
    mlp: PackedMLP,
    lead: tuple[int, ...],
    num_samples: int,
    implementation: str,
    precision: str | None = None,
    t: float | Tensor = 0.75,
    from_samples: bool = False,
    **options: Any,
) -> None:
    precision = precision or MOST_EXACT[implementation]
    d, cond_dim = mlp.action_dim, mlp.cond_dim
    cond, displacement = draw(*lead, cond_dim), draw(*lead, d, seed=1)
    noise, bridge, upstream = (
        draw(*lead, num_samples, d, seed=2),
        draw(*lead, num_samples, d, seed=3),
        draw(*lead, seed=4),
    )
    leaf = guarded(displacement).requires_grad_()
    start = {"samples" if from_samples else "noise": guarded(noise)}
    with at_once(implementation, precision):
        penalty, score = fdkernels.flow_fisher_penalty(
            mlp, guarded(cond), leaf, **start, bridge_noise=guarded(bridge), num_steps=3, return_score=True,
            t=guarded(t) if isinstance(t, Tensor) else t, implementation=implementation, precision=precision, **options,
        )  # fmt: skip
        alone = fdkernels.flow_fisher_penalty(
            mlp, guarded(cond), leaf, **start, bridge_noise=guarded(bridge), num_steps=3,
            t=guarded(t) if isinstance(t, Tensor) else t, implementation=implementation, precision=precision, **options,
        )  # fmt: skip
    # two kernels, which a compiler may round differently
    torch.testing.assert_close(alone, penalty, rtol=0 if INTERPRETED else 1e-6, atol=0)
    (gradient,) = torch.autograd.grad(penalty, leaf, upstream.to(DEVICE))

    reference = in_double(mlp)
    spread = cond.double().unsqueeze(-2).expand(*lead, num_samples, cond_dim)
    of_score = {name: options.pop(name) for name in ("path", "convention") if name in options}
    path, samples = of_score.get("path", "linear"), noise.double()
    if not from_samples:
        samples = fdkernels_ref.integrate_flow(reference, samples, spread, num_steps=3, path=path)
    time = t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    time = time.expand(*lead, num_samples, 1)
    x_t = path_of(path).sigma(time) * bridge.double() + path_of(path).alpha(time) * samples
    scores = fdkernels_ref.velocity_to_score(reference(x_t, time, spread), x_t, time, **of_score)
    truth_leaf = displacement.double().requires_grad_()
    truth = fdkernels_ref.fisher_penalty(truth_leaf, scores, **options)
    (truth_gradient,) = torch.autograd.grad(truth, truth_leaf, upstream.double())
    bar = PRECISIONS[precision]
    assert relative(score, scores.detach()) < bar
    assert relative(penalty.detach(), truth.detach()) < 2 * bar  # quadratic in the scores
    assert relative(gradient, truth_gradient) < 2 * bar


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_samples", [1, 3, 4, *(pytest.param(k, marks=long) for k in (5, 16))])
def test_chain(num_samples: int, implementation: str) -> None:
    lead = (7 if INTERPRETED and num_samples > 4 else 21,)
    judge_chain(network(17, 6, (64, 64, 64)), lead, num_samples, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chain_options(implementation: str) -> None:
    mlp = network(5, 3, (32, 32))
    judge = functools.partial(judge_chain, mlp, (2, 5), 3, implementation)
    judge(normalize="none", damping=0.5)
    judge(convention="velocity", eps=1e3)
    judge(from_samples=True)
    judge(t=0.5 + 0.4 * draw(2, 5, 3, 1).sigmoid())
    judge(t=torch.full((1,), 0.5), from_samples=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chain_on_other_paths(implementation: str) -> None:
    mlp = network(5, 3, (32, 32))
    judge = functools.partial(judge_chain, mlp, (5,), 3, implementation)
    square = fdkernels.AffinePath(  # data at t = 0
        lambda t: (1 - t) ** 2, lambda t: t, lambda t: 2 * (t - 1), lambda t: torch.ones_like(t)
    )
    judge(path="linear_reversed", t=0.1)
    judge(path="vp", t=0.9, from_samples=True)
    judge(path="cosine", t=0.5 + 0.4 * draw(5, 3, 1).sigmoid())
    judge(path=square, t=0.2)


@pytest.mark.parametrize("source", ["seed", "noise", "samples"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], source: str) -> None:
    """Any number of them, whatever the samples come from; a condition with more is none of an MLP."""
    mlp, cond, displacement = network(3, 2, (16,)), guarded(draw(*lead, 3)), guarded(draw(*lead, 2))
    noise = guarded(draw(*lead, 4, 2))
    given = {"seed": 3} if source == "seed" else {source: noise, "bridge_noise": noise.flip(-1)}
    run = functools.partial(fdkernels.flow_fisher_penalty, mlp, displacement=displacement, num_steps=1, **given)
    torch.testing.assert_close(run(cond, backend="triton"), run(cond, backend="torch"), rtol=1e-3, atol=1e-4)
    tokens = cond.unsqueeze(-2).expand(*lead, 5, 3)
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"velocity is an MLP, whose cond is a tensor \(\.\.\., c\), got"):
            run(tokens, backend=backend)


@pytest.mark.parametrize("seeded", [False, True])
def test_chunks_are_flattened_actions(seeded: bool) -> None:
    mlp, cond, chunk, noise = (
        network(5, 6, (16,)),
        guarded(draw(3, 5)),
        guarded(draw(3, 2, 3)),
        guarded(draw(3, 4, 2, 3)),
    )
    options = {"seed": 3} if seeded else {"noise": noise, "bridge_noise": noise.flip(0)}
    options |= {"num_steps": 1, "backend": "triton", "return_score": True}
    chunked = fdkernels.flow_fisher_penalty(mlp, cond, chunk, event_dim=2, **options)
    options |= {name: options[name].flatten(2) for name in ("noise", "bridge_noise") if name in options}
    penalty, score = fdkernels.flow_fisher_penalty(mlp, cond, chunk.flatten(1), **options)
    assert torch.equal(chunked[0], penalty)
    assert torch.equal(chunked[1], score.view(3, 4, 2, 3))
    run = functools.partial(fdkernels.integrate_flow_groups, mlp, conds=[cond], num_steps=1, backend="triton")
    assert torch.equal(run([chunk], event_dim=2)[0], run([chunk.flatten(1)])[0].view_as(chunk))
    path = functools.partial(fdkernels.integrate_flow, mlp, num_steps=2, backend="triton", return_path=True)
    whole = path(chunk, cond, event_dim=2)
    assert torch.equal(whole, path(chunk.flatten(1), cond).view(3, 3, 2, 3))


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
def test_more_samples_than_a_program_holds(implementation: str) -> None:
    judge_chain(network(3, 2, (16, 16)), (4,), 70, implementation)
    judge_chain(network(3, 17, (16, 16)), (5,), 33, implementation)


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
def test_autocast_reaches_no_further_than_it_is_let(implementation: str) -> None:
    """An explicit precision is used; without one, autocast decides."""
    mlp, x0, cond = network(5, 3, (32, 32)), guarded(draw(9, 3)), guarded(draw(9, 5))
    run = functools.partial(fdkernels.integrate_flow, mlp, x0, cond, implementation=implementation)
    penalty = functools.partial(
        fdkernels.flow_fisher_penalty, mlp, cond, x0, implementation=implementation, precision="highest", seed=3
    )
    plain = run(precision="highest"), penalty()
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert torch.equal(run(precision="highest"), plain[0])
        assert torch.equal(penalty(), plain[1])
        half = run()
    assert not torch.equal(half, plain[0])
    assert relative(half, plain[0].double().cpu()) < PRECISIONS["bf16"]


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
@pytest.mark.parametrize(("activation", "layer_norm"), [("relu", False), ("silu", True)])
def test_networks_stacked_twice(implementation: str, activation: Any, layer_norm: bool) -> None:
    """One vmap inside another."""
    modules = [fdkernels.VelocityMLP(5, 3, (16, 24), activation, layer_norm).to(DEVICE) for _ in range(4)]
    parameters, _ = torch.func.stack_module_state(modules)
    parameters = {name: value.unflatten(0, (2, 2)) for name, value in parameters.items()}
    x0, cond = guarded(draw(2, 2, 7, 3)), guarded(draw(2, 2, 7, 5))
    run = functools.partial(fdkernels.integrate_flow, num_steps=2, implementation=implementation, precision="highest")

    def end(parameters: dict[str, Tensor], x0: Tensor, cond: Tensor) -> Tensor:
        calls = _Calls(modules[0], lambda module: run(module, x0, cond))
        return torch.func.functional_call(calls, {f"module.{k}": v for k, v in parameters.items()}, ())

    ends = torch.vmap(torch.vmap(end))(parameters, x0, cond).flatten(0, 1)
    for out, module, *rows in zip(ends, modules, x0.flatten(0, 1), cond.flatten(0, 1)):
        assert_agree(out, run(module, *rows), true_end(module, *rows, num_steps=2))


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
def test_noise_from_a_seed(implementation: str) -> None:
    """The kernel draws the same numbers as the generator in PyTorch, and others for another seed."""
    mlp, cond, displacement = network(5, 3, (16, 16)), guarded(draw(7, 5)), guarded(draw(7, 3))
    seed = 2**40 + 17
    noise, bridge = (philox_normal(seed, (7, 4, 3), DEVICE, torch.float32, first=first) for first in (0, 84))
    penalty = functools.partial(
        fdkernels.flow_fisher_penalty, mlp, cond, displacement, implementation=implementation, num_steps=2
    )
    drawn = penalty(seed=seed)
    given_noise = penalty(noise=noise, bridge_noise=bridge)
    truth, _ = true_penalty(mlp, cond, displacement, noise, bridge)
    assert_agree(drawn, given_noise, truth, bar=2 * PRECISIONS["high"])
    assert torch.equal(drawn, penalty(seed=torch.tensor(seed, device=DEVICE)))
    assert not torch.equal(drawn, penalty(seed=seed + 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_equal_separate_calls(implementation: str) -> None:
    mlp, obs = network(5, 3, (32, 32)), guarded(draw(6, 5))
    x0s, conds = [guarded(draw(6, 3)), guarded(draw(6, 4, 3))], [obs, obs.unsqueeze(1)]
    with at_once(implementation):
        together = fdkernels.integrate_flow_groups(
            mlp, x0s, conds, num_steps=3, implementation=implementation, precision="high"
        )
        apart = [
            fdkernels.integrate_flow(mlp, x0, cond, num_steps=3, implementation=implementation, precision="high")
            for x0, cond in zip(x0s, conds)
        ]
    truth = [true_end(mlp, x0, cond, num_steps=3) for x0, cond in zip(x0s, conds)]
    assert_agree(together, apart, truth, bar=PRECISIONS["high"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_networks_in_one_launch(implementation: str) -> None:
    """vmap over stacked parameters, with and without common rows, gives the results of separate calls."""
    bar = PRECISIONS["high"]
    modules = [fdkernels.VelocityMLP(5, 3, (32, 32)).to(DEVICE) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x0, cond, shared = guarded(draw(3, 9, 3)), guarded(draw(3, 9, 5)), guarded(draw(9, 5))

    def end(parameters: dict[str, Tensor], x0: Tensor, cond: Tensor) -> Tensor:
        base = modules[0]

        def solve(module: nn.Module) -> Tensor:
            return fdkernels.integrate_flow(
                module, x0, cond, num_steps=2, implementation=implementation, precision="high", return_path=True
            )

        return torch.func.functional_call(_Calls(base, solve), {f"module.{k}": v for k, v in parameters.items()}, ())

    def penalty(parameters: dict[str, Tensor], displacement: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        def solve(module: nn.Module) -> Tensor:
            return fdkernels.flow_fisher_penalty(
                module,
                cond,
                displacement,
                noise=noise,
                bridge_noise=noise,
                num_steps=2,
                implementation=implementation,
                precision="high",
            )

        return torch.func.functional_call(
            _Calls(modules[0], solve), {f"module.{k}": v for k, v in parameters.items()}, ()
        )

    displacement = guarded(draw(3, 9, 3, seed=5)).requires_grad_()
    noise = guarded(draw(3, 9, 4, 3))
    with at_once(implementation):
        ends = torch.vmap(end)(parameters, x0, cond)
        ends_shared = torch.vmap(end, in_dims=(0, 0, None))(parameters, x0, shared)
        rows_only = torch.vmap(end, in_dims=(None, 0, 0))({k: v[1] for k, v in parameters.items()}, x0, cond)
        penalties = torch.vmap(penalty)(parameters, displacement, cond, noise)
        (gradient,) = torch.autograd.grad(penalties.sum(), displacement)
        for i, module in enumerate(modules):
            single = functools.partial(
                fdkernels.integrate_flow, num_steps=2, implementation=implementation, precision="high", return_path=True
            )
            for out, network, *rows in (
                (ends[i], module, x0[i], cond[i]),
                (ends_shared[i], module, x0[i], shared),
                (rows_only[i], modules[1], x0[i], cond[i]),
            ):
                truth = true_end(network, *rows, num_steps=2, return_path=True)
                assert_agree(out, single(network, *rows), truth, bar)
            leaf = displacement[i].detach().requires_grad_()
            one = fdkernels.flow_fisher_penalty(
                module,
                cond[i],
                leaf,
                noise=noise[i],
                bridge_noise=noise[i],
                num_steps=2,
                implementation=implementation,
                precision="high",
            )
            truth = true_penalty(module, cond[i], leaf, noise[i], noise[i])
            (one_gradient,) = torch.autograd.grad(one.sum(), leaf)
            assert_agree((penalties[i], gradient[i]), (one, one_gradient), truth, 2 * bar)


class _Calls(nn.Module):
    """A module whose forward calls a function of another, so that ``functional_call`` can replace its parameters."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self) -> Tensor:
        return self.function(self.module)


def test_a_seed_under_vmap_is_the_seed_of_each_call() -> None:
    """One seed for all, and one for each, give the numbers of separate calls."""
    mlp, cond, displacement = network(5, 3, (16, 16)), guarded(draw(2, 7, 5)), guarded(draw(2, 7, 3))
    seeds = torch.tensor([3, 2**33], device=DEVICE)

    def penalty(cond: Tensor, displacement: Tensor, seed: Tensor) -> Tensor:
        return fdkernels.flow_fisher_penalty(mlp, cond, displacement, seed=seed, num_steps=2, implementation="streamed")

    shared = torch.vmap(penalty, in_dims=(0, 0, None))(cond, displacement, seeds[0])
    own = torch.vmap(penalty)(cond, displacement, seeds)
    for i in range(2):
        for out, seed in ((shared[i], seeds[0]), (own[i], seeds[i])):
            draws = (philox_normal(seed, (7, 4, 3), DEVICE, torch.float32, first=first) for first in (0, 84))
            truth, _ = true_penalty(mlp, cond[i], displacement[i], *draws)
            assert_agree(out, penalty(cond[i], displacement[i], seed), truth, 2 * PRECISIONS["high"])


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
@pytest.mark.parametrize("name", ["by hand", "loop"])
def test_networks_read_from_their_forwards(name: str, implementation: str) -> None:
    packed = fdkernels.pack_mlp(zoo.READABLE[name].make().to(DEVICE).eval())
    judge_flow(packed, draw(9, zoo.D), draw(9, zoo.C), implementation, num_steps=2)


@pytest.mark.parametrize("implementation", ["streamed", "gemm"])
def test_weights_are_read_in_place(implementation: str) -> None:
    """The next call sees an optimiser's step on the module."""
    module = fdkernels.VelocityMLP(5, 3, (16, 16)).to(DEVICE)
    packed, x0, cond = fdkernels.pack_mlp(module), guarded(draw(9, 3)), guarded(draw(9, 5))
    run = functools.partial(
        fdkernels.integrate_flow, packed, x0, cond, num_steps=2, clip=None, implementation=implementation
    )
    run()  # library products are recorded on the second call and replayed on later ones
    before = run()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    after = run()
    assert not torch.equal(before, after)
    judge_flow(packed, x0.cpu(), cond.cpu(), implementation, num_steps=2, clip=None)


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_weights(dtype: torch.dtype, implementation: str) -> None:
    """Products in the weights' dtype have at most twice the error of the plain loop in that dtype."""
    mlp = mlp_on(network(17, 6, (64, 64, 64)), DEVICE, dtype)
    x0, cond = draw(40, 6, dtype=dtype), draw(40, 17, dtype=dtype)
    with at_once(implementation):
        out = fdkernels.integrate_flow(mlp, guarded(x0), guarded(cond), implementation=implementation)
    assert out.dtype == dtype
    truth = fdkernels_ref.integrate_flow(in_double(mlp), x0.double(), cond.double())
    plain = fdkernels_ref.integrate_flow(mlp_on(mlp, torch.device("cpu"), dtype), x0, cond)
    assert relative(out, truth) < min(2 * relative(plain, truth), BARS[dtype]["triton"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batch_and_bad_rows(implementation: str) -> None:
    mlp = network(5, 3, (32, 32))
    run = functools.partial(fdkernels.integrate_flow, mlp, num_steps=2, implementation=implementation, precision="high")
    assert run(torch.empty(0, 3, device=DEVICE), torch.empty(0, 5, device=DEVICE)).shape == (0, 3)
    x0, cond = draw(20, 3), draw(20, 5)
    with at_once(implementation):
        clean = run(guarded(x0), guarded(cond))
        x0[4, 1] = torch.nan
        out = run(guarded(x0), guarded(cond))
    good = [row for row in range(20) if row != 4]
    assert torch.equal(out[good], clean[good])
    assert out[4].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="shuffles the interpreter's threads; a GPU has the next test")
def test_programs_that_dawdle() -> None:
    """No program reads data that are not written yet, in whatever order the programs of a group run."""
    mlp, x0, cond = network(5, 3, (32, 32, 32, 32)), draw(50, 3), draw(50, 5)
    run = functools.partial(fdkernels.integrate_flow, mlp, guarded(x0), guarded(cond), num_steps=2)
    outs = []
    for seed in range(4):
        with programs_together(seed, pause=0.002):
            outs.append(run(implementation="stationary", precision="high"))
    assert all(torch.equal(out, outs[0]) for out in outs)
    judge_flow(mlp, x0, cond, "stationary", num_steps=2)


@on_gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 256, 1536])
def test_a_thousand_times_the_same_bits(implementation: str, rows: int) -> None:
    """Sooner or later a race shows as a difference; other work on the GPU varies the timing."""
    module = fdkernels.VelocityMLP(17, 6).to(DEVICE)
    x0, cond = draw(rows, 6).to(DEVICE), draw(rows, 17).to(DEVICE)
    run = functools.partial(fdkernels.integrate_flow, module, x0, cond, implementation=implementation, precision="bf16")
    first, differences = run(), torch.zeros((), dtype=torch.int64, device=DEVICE)
    side, load = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(side):
                load @ load
        differences += (run() != first).any()
    assert differences.item() == 0


@on_gpu
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "gemm"])
def test_one_launch_forward_and_one_backward(implementation: str) -> None:
    module = fdkernels.VelocityMLP(17, 6).to(DEVICE)
    cond, displacement = draw(256, 17).to(DEVICE), draw(256, 6).to(DEVICE).requires_grad_()
    upstream, seed = draw(256).to(DEVICE), torch.tensor(3, device=DEVICE)

    def kernels(run: Callable[[], Any]) -> list[str]:
        """What ran on the GPU, without the memory that was set and copied."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return [name for name in names if not name.startswith(("Memset", "Memcpy"))]

    def forward() -> Tensor:
        return fdkernels.flow_fisher_penalty(
            module, cond, displacement, seed=seed, implementation=implementation, precision="high"
        )

    def backward() -> None:
        torch.autograd.grad(penalty, displacement, upstream, retain_graph=True)

    penalty = forward()
    backward()
    for run in (forward, backward):
        assert len(found := kernels(run)) == 1, found


@on_gpu
def test_capture_in_a_graph() -> None:
    """A captured solve follows its inputs, its weights and a seed that counts on the device."""
    module = fdkernels.VelocityMLP(17, 6).to(DEVICE)
    x0, cond, seed = (
        draw(256, 6).to(DEVICE),
        draw(256, 17).to(DEVICE),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
    )
    displacement = draw(256, 6).to(DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        seed.add_(1)
        return fdkernels.integrate_flow(module, x0, cond), fdkernels.flow_fisher_penalty(
            module, cond, displacement, seed=seed
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end, penalty = step()
    graph.replay()
    first = penalty.clone()
    with torch.no_grad():
        x0.normal_()
        for parameter in module.parameters():
            parameter.mul_(1.1)
    graph.replay()
    torch.testing.assert_close(end, fdkernels.integrate_flow(module, x0, cond))
    torch.testing.assert_close(penalty, fdkernels.flow_fisher_penalty(module, cond, displacement, seed=seed))
    assert not torch.equal(first, penalty)


@on_gpu
def test_replayed_products_follow_their_inputs() -> None:
    """Library products: alternating shapes and streams, fresh outputs, gradients, a seed, moved weights."""
    module = fdkernels.VelocityMLP(17, 6, (64, 64)).to(DEVICE)
    run = functools.partial(fdkernels.integrate_flow, implementation="gemm", num_steps=2)
    plain = functools.partial(fdkernels.integrate_flow, backend="torch", num_steps=2)
    kept, side = [], torch.cuda.Stream()
    for i in range(6):
        for rows in (3, 50):
            x0, cond = draw(rows, 6, seed=i).to(DEVICE), draw(rows, 17, seed=i).to(DEVICE)
            kept.append((run(module, x0, cond), plain(module, x0, cond)))
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kept.append((run(module, x0, cond), kept[-1][1]))
            torch.cuda.current_stream().wait_stream(side)
        if i == 3:
            module = copy.deepcopy(module)
            for parameter in module.parameters():
                parameter.data.mul_(1.1)
    torch.cuda.synchronize()
    for out, right in kept:
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
    cond, displacement = draw(9, 17).to(DEVICE), draw(9, 6).to(DEVICE).requires_grad_()
    penalty = functools.partial(fdkernels.flow_fisher_penalty, module, cond, displacement, num_steps=2)
    for seed in range(4):
        outs = []
        for implementation in ("gemm", "streamed"):
            out = penalty(seed=seed, implementation=implementation)
            outs.append((out, *torch.autograd.grad(out.sum(), displacement)))
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in fresh memory is not equal to itself
    packed = network(5, 3, (16, 16))
    encoded = encode([layer.read() for layer in packed.layers], packed.order)
    x0, cond, displacement = draw(1, 8, 3).to(DEVICE), draw(1, 8, 5).to(DEVICE), draw(1, 2, 3).to(DEVICE)
    solver, way = Solver([0.0, 0.5, 1.0], "heun", -1.0, 1.0, "end"), Way("highest", "streamed")
    for want_path in (False, True):
        call = integrate_op.Call(x0, cond, encoded, solver, want_path, way)
        torch.library.opcheck(torch.ops.fdkernels.integrate_flow.default, Layout(integrate_op.Call).flat(call))
    chain = Chain(
        Noise(x0, x0, None, 4), cond[:, :2].contiguous(), displacement.requires_grad_(requires_grad),
        TimedAffine(None, 0.5, 0.6, 0.8, 1.0, -2.0, True), encoded, solver, PenaltyRule(1e-3, True, 1e-6), True, way,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fdkernels.flow_fisher_penalty.default, Layout(Chain).flat(chain))


@on_gpu
def test_compiled_with_cuda_graphs() -> None:
    """Inductor's own graphs and recorded solves do not write to each other's memory."""
    module = fdkernels.VelocityMLP(17, 6).to(DEVICE)
    inputs = [(draw(40, 6, seed=i).to(DEVICE), draw(40, 17, seed=i).to(DEVICE)) for i in range(4)]
    recorded = functools.partial(fdkernels.integrate_flow, module, num_steps=3, implementation="gemm")
    truth = [recorded(*pair) for pair in inputs]  # from the second call on by a graph

    @functools.partial(torch.compile, mode="reduce-overhead")
    def compiled(x0: Tensor, cond: Tensor) -> Tensor:
        return 2 * fdkernels.integrate_flow(module, x0, cond, num_steps=7)

    plain = [2 * fdkernels.integrate_flow(module, *pair, num_steps=7) for pair in inputs]
    for _ in range(3):
        for pair, right, double in zip(inputs, truth, plain):
            with torch.inference_mode():
                torch.testing.assert_close(recorded(*pair), right)
            torch.testing.assert_close(compiled(*pair).clone(), double)
            torch.testing.assert_close(recorded(*pair), right)
            recorded(torch.cat([pair[0]] * 2), torch.cat([pair[1]] * 2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_whole(compiler: str, dynamic: bool) -> None:
    torch.compiler.reset()
    module = fdkernels.VelocityMLP(5, 3, (16, 16)).to(DEVICE)
    cond, displacement = draw(8, 5).to(DEVICE), draw(8, 3).to(DEVICE).requires_grad_()
    noise = draw(8, 4, 3).to(DEVICE)

    def chain(cond: Tensor, displacement: Tensor, noise: Tensor) -> Tensor:
        action = fdkernels.integrate_flow(module, noise[:, 0], cond, num_steps=2, backend="triton")
        penalty = fdkernels.flow_fisher_penalty(
            module, cond, displacement, noise=noise, bridge_noise=noise, num_steps=2, backend="triton"
        )
        return penalty.sum() + action.sum()

    compiled = torch.compile(chain, fullgraph=True, dynamic=dynamic, backend=compiler)
    tables: list[int] = []

    def backend(graph: Any, _: object) -> Any:
        tables.append(timetable._on_device.cache_info().misses)
        return graph

    timetable._on_device.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        torch.compile(chain, fullgraph=True, dynamic=dynamic, backend=backend)(cond, displacement, noise)
    assert tables == [1]  # both use one solver table, on the device before anything runs
    torch.compiler.reset()

    def both(function: Any) -> tuple[Tensor, ...]:
        value = function(cond, displacement, noise)
        return value, *torch.autograd.grad(value, displacement)

    ends, (penalty, gradient) = (
        true_end(module, noise[:, 0], cond, num_steps=2),
        true_penalty(module, cond, displacement, noise, noise),
    )
    assert_agree(both(compiled), both(chain), (penalty.sum() + ends.sum(), gradient), 2 * PRECISIONS["high"])


def test_what_the_kernels_do_not_serve() -> None:
    x0, cond = guarded(draw(4, 3)), guarded(draw(4, 5))
    run = functools.partial(fdkernels.integrate_flow, x0=x0, cond=cond, backend="triton")
    with pytest.raises(RuntimeError, match="integrate_flow: backend='triton' serves a VelocityMLP or a packed MLP"):
        run(lambda x, t, cond: x)
    with pytest.raises(RuntimeError, match="no gradient through the solver, which differentiable=True asks for"):
        run(network(5, 3, (16,)), differentiable=True)
    with pytest.raises(RuntimeError, match="serves networks with a hidden layer"):
        run(network(5, 3, ()))
    with pytest.raises(RuntimeError, match=r"serves float32, bfloat16 and float16, got torch\.float64"):
        run(network(5, 3, (16,)), x0=x0.double())
    with pytest.raises(ValueError, match="implementation='stationary' serves two or more hidden layers of one width"):
        run(network(5, 3, (16, 32)), implementation="stationary", precision="high")
    with pytest.raises(ValueError, match="implementation='stationary' has no room for the two parts of each weight"):
        run(network(5, 3, (32, 32)), implementation="stationary", precision="highest")
    with pytest.raises(ValueError, match="implementation='stationary' has no room for more than 64 dimensions, got 65"):
        run(network(0, 65, (32, 32)), x0=guarded(draw(4, 65)), cond=None, implementation="stationary", precision="high")
    with pytest.raises(ValueError, match="velocity's weights are on meta, got x0 on"):
        run(mlp_on(network(5, 3, (16,)), torch.device("meta"), torch.float32))
    with pytest.raises(RuntimeError, match=r"needs torch\.set_float32_matmul_precision\('high'\), got 'highest'"):
        run(network(5, 3, (16,)), implementation="gemm", precision="high")
    with pytest.raises(ValueError, match="implementation='streamed' belongs to backend='triton', got backend='torch'"):
        run(network(5, 3, (16,)), implementation="streamed", backend="torch")
    with pytest.raises(ValueError, match="implementation must be one of"):
        run(network(5, 3, (16,)), implementation="fast")
