"""The whole chain, from noise to penalty, on the PyTorch path."""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
from torch import Tensor

import fdkernels
import fdkernels_ref
from fdkernels.philox import philox_normal
from tests.closed_forms import anisotropic_gaussian
from tests.judge import assert_agree

F64 = torch.float64


@pytest.mark.parametrize("tensor_time", [False, True])
@pytest.mark.parametrize("convention", ["exact", "velocity"])
def test_flow_fisher_penalty(convention: str, tensor_time: bool) -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16, 16)).double()
    cond, displacement = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    noise, bridge = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    options = {
        "t": torch.rand(5, 7, 1, dtype=torch.float64) if tensor_time else 0.9,
        "num_steps": 4, "damping": 1e-2, "convention": convention,
        "noise": noise, "bridge_noise": bridge, "num_samples": 7,
    }  # fmt: skip
    for velocity in (flow, lambda x, t, cond: flow(x, t, cond)):
        ours, theirs = displacement.clone().requires_grad_(), displacement.clone().requires_grad_()
        penalty, score = fdkernels.flow_fisher_penalty(velocity, cond, ours, return_score=True, **options)
        expected, their_score = fdkernels_ref.flow_fisher_penalty(flow, cond, theirs, return_score=True, **options)
        torch.testing.assert_close(score, their_score)
        torch.testing.assert_close(penalty, expected)
        penalty.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert all(p.grad is None for p in flow.parameters())


def test_flow_fisher_penalty_meets_the_closed_form() -> None:
    gaussian = anisotropic_gaussian(3)
    torch.manual_seed(0)
    k, t = 20_000, 0.8
    displacement = torch.randn(4, 3, dtype=torch.float64)
    penalty = fdkernels.flow_fisher_penalty(
        gaussian.velocity, torch.zeros(4, 1, dtype=torch.float64), displacement,
        num_samples=k, t=t, num_steps=40, method="rk4", clip=None, damping=0.0, normalize="none",
    )  # fmt: skip
    precision = torch.linalg.inv(gaussian.covariance_t(t))
    exact = torch.einsum("bi,ij,bj->b", displacement, precision, displacement) / 3
    # (s·δ)² is exact·d times a χ² with one degree of freedom: relative standard error √(2/K)
    z = (penalty / exact - 1).abs() / (2 / k) ** 0.5
    assert (z < 4.5).all(), f"{z} standard errors"


def test_what_is_drawn_comes_from_the_generator() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8,))
    cond, displacement = torch.randn(5, 4), torch.randn(5, 3)
    first, again, other = (
        fdkernels.flow_fisher_penalty(flow, cond, displacement, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_chain_takes_other_precisions() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8,))
    cond, displacement, noise = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 2, 3)
    given = {"noise": noise, "bridge_noise": noise.flip(0)}
    exact, wide = copy.deepcopy(flow).double(), {name: tensor.double() for name, tensor in given.items()}

    def truth(displacement: Tensor) -> Tensor:
        return fdkernels_ref.flow_fisher_penalty(
            exact, cond.double(), displacement.double(), t=0.75, num_samples=2, **wide
        )

    plain = functools.partial(fdkernels_ref.flow_fisher_penalty, flow, cond, t=0.75, num_samples=2, **given)
    wide_time = torch.full((5, 1, 1), 0.75, dtype=torch.float64)
    ours = fdkernels.flow_fisher_penalty(flow, cond, displacement, t=wide_time, **given)
    assert_agree(ours, plain(displacement), truth(displacement))
    short = displacement.bfloat16()
    ours = fdkernels.flow_fisher_penalty(flow, cond, short, t=0.75, **given)
    assert_agree(ours, plain(short.float()), truth(short))
    with torch.autocast("cpu", torch.bfloat16):
        ours, rough = fdkernels.flow_fisher_penalty(flow, cond, displacement, t=0.75, **given), plain(displacement)
    assert_agree(ours.float(), rough.float(), truth(displacement), bar=0.1)
    low = fdkernels.VelocityMLP(4, 3, hidden=(8,)).bfloat16()
    assert fdkernels.integrate_flow(low, noise[:, 0].bfloat16(), cond.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, got x0 of torch.float32"):
        fdkernels.integrate_flow(low, noise[:, 0], cond)


def penalty_case(rows: int = 5, k: int = 4) -> tuple[fdkernels.VelocityMLP, Tensor, Tensor, Tensor, Tensor]:
    """flow, cond, displacement, noise, bridge_noise in float64."""
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16, 8)).double()
    cond, displacement = torch.randn(rows, 4, dtype=F64), torch.randn(rows, 3, dtype=F64)
    return flow, cond, displacement, *torch.randn(2, rows, k, 3, dtype=F64)


@pytest.mark.parametrize("return_score", [False, True])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_clipped_at_each_step(method: str, return_score: bool) -> None:
    flow, cond, displacement, noise, bridge = penalty_case()
    options = {"noise": 2 * noise, "bridge_noise": bridge, "clip_each_step": True, "method": method, "num_samples": 4}
    ours = fdkernels.flow_fisher_penalty(flow, cond, displacement, return_score=return_score, **options)
    theirs = fdkernels_ref.flow_fisher_penalty(flow, cond, displacement, return_score=return_score, **options)
    torch.testing.assert_close(ours, theirs)
    options["clip_each_step"] = False
    once = fdkernels.flow_fisher_penalty(flow, cond, displacement, **options)
    assert not torch.allclose(ours[0] if return_score else ours, once)


@pytest.mark.parametrize("return_score", [False, True])
def test_samples_that_are_integrated_already(return_score: bool) -> None:
    flow, cond, displacement, noise, bridge = penalty_case()
    (samples,) = fdkernels.integrate_flow_groups(flow, [noise], [cond.unsqueeze(1)])
    whole, given = displacement.clone().requires_grad_(), displacement.clone().requires_grad_()
    options = {"bridge_noise": bridge, "t": 0.9, "return_score": return_score}
    expected = fdkernels.flow_fisher_penalty(flow, cond, whole, noise=noise, **options)
    with mock.patch("fdkernels.chain.integrate", side_effect=AssertionError("integrated again")):
        ours = fdkernels.flow_fisher_penalty(flow, cond, given, samples=samples, **options)
    torch.testing.assert_close(ours, expected)
    for penalty in (ours, expected):
        (penalty[0] if return_score else penalty).sum().backward()
    torch.testing.assert_close(given.grad, whole.grad)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_seeded_noise_is_the_documented_one(as_tensor: bool) -> None:
    flow, cond, displacement, *_ = penalty_case(rows=6, k=5)
    number = 6 * 5 * 3
    noise, bridge = (philox_normal(11, (6, 5, 3), "cpu", F64, first=first) for first in (0, number))
    seed = torch.tensor(11) if as_tensor else 11
    ours = fdkernels.flow_fisher_penalty(flow, cond, displacement, num_samples=5, seed=seed)
    expected = fdkernels_ref.flow_fisher_penalty(
        flow, cond, displacement, num_samples=5, noise=noise, bridge_noise=bridge
    )
    torch.testing.assert_close(ours, expected)
    torch.manual_seed(99)
    assert torch.equal(ours, fdkernels.flow_fisher_penalty(flow, cond, displacement, num_samples=5, seed=11))
    assert not torch.equal(ours, fdkernels.flow_fisher_penalty(flow, cond, displacement, num_samples=5, seed=12))
    (samples,) = fdkernels.integrate_flow_groups(flow, [noise], [cond.unsqueeze(1)])
    again = fdkernels.flow_fisher_penalty(flow, cond, displacement, samples=samples, seed=11)
    torch.testing.assert_close(again, ours)


@pytest.mark.parametrize("return_score", [False, True])
def test_the_displacement_alone_gets_a_gradient(return_score: bool) -> None:
    flow, *tensors = penalty_case()
    cond, displacement, noise, bridge = (x.requires_grad_() for x in tensors)
    t = torch.full((5, 1, 1), 0.9, dtype=F64, requires_grad=True)
    out = fdkernels.flow_fisher_penalty(
        flow, cond, displacement, noise=noise, bridge_noise=bridge, t=t, return_score=return_score
    )
    (out[0] if return_score else out).sum().backward()
    assert displacement.grad is not None
    assert all(x.grad is None for x in (cond, noise, bridge, t, *flow.parameters()))


def test_the_condition_is_multiplied_once_per_state() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16,)).double()
    cond, displacement = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    linear, rows = torch.nn.functional.linear, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[-1] == 4:
            rows.append(x.numel() // 4)
        return linear(x, weight, bias)

    with mock.patch("torch.nn.functional.linear", counted):
        fdkernels.flow_fisher_penalty(flow, cond, displacement, num_samples=7)
    assert rows == [5]


def test_compiles_without_a_graph_break() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8, 8))

    def chain(cond: Tensor, displacement: Tensor, noise: Tensor) -> Tensor:
        precision = None if noise.dtype == F64 else "bf16"
        action, samples = fdkernels.integrate_flow_groups(
            flow, [noise[:, 0], noise], [cond, cond.unsqueeze(1)], num_steps=3, precision=precision
        )
        penalty = fdkernels.flow_fisher_penalty(flow, cond, displacement, samples=samples, seed=3)
        whole = fdkernels.flow_fisher_penalty(
            flow, cond, displacement, noise=noise, bridge_noise=noise.flip(0), num_steps=3
        )
        return penalty + whole + action.sum(-1)

    inputs = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 2, 3)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    low = compiled(*inputs), chain(*inputs)
    flow.double()
    assert_agree(*low, chain(*(tensor.double() for tensor in inputs)), bar=1e-2)


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_empty_batches(lead: tuple[int, ...]) -> None:
    flow = fdkernels.VelocityMLP(5, 6, hidden=(8,))
    cond, displacement = torch.randn(*lead, 5), torch.randn(*lead, 6)
    assert fdkernels.flow_fisher_penalty(flow, cond, displacement).shape == lead
    assert fdkernels.flow_fisher_penalty(flow, cond, displacement, seed=1).shape == lead


C, D, S = torch.randn(4, 5), torch.randn(4, 6), torch.randn(4, 3, 6)
FLOW = fdkernels.VelocityMLP(5, 6, hidden=(8,))
BAD = {
    "K": ({"num_samples": 0}, "num_samples"),
    "bridge noise": ({"noise": S, "bridge_noise": S[:, :2]}, "noise and bridge_noise must have the same K"),
    "no K": ({"noise": D}, r"noise must be \(\.\.\., K, d\) .* leading shape \(4,\), got \(4, 6\)"),
    "samples": ({"samples": S[:2]}, "samples must be"),
    "samples and noise": ({"samples": S, "noise": S}, "samples and noise exclude each other"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, "seed and generator exclude each other"),
    "wide seed": ({"seed": 2**64}, "seed must have 64 bits"),
    "seeds": ({"seed": torch.arange(2)}, r"no dimensions, got shape \(2,\)"),
    "seed elsewhere": ({"seed": torch.tensor(1, device="meta")}, "must be on cpu, .* got meta"),
    "damping": ({"damping": -1.0}, "flow_fisher_penalty: damping"),
    "no bounds": ({"clip": None, "clip_each_step": True}, "clip_each_step needs bounds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fdkernels.flow_fisher_penalty(FLOW, C, D, **options)


@pytest.mark.parametrize("seed", [1.0, True, torch.tensor(1.0), "1"])
def test_a_seed_is_an_integer(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an int or an integer tensor"):
        fdkernels.flow_fisher_penalty(FLOW, C, D, seed=seed)
