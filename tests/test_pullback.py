"""The flow's Jacobian and the pull-back penalty on the PyTorch path, against the reference in float64."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from fdkernels.activations import ACTIVATIONS
from fdkernels.philox import philox_normal
from fdkernels.solvers import METHODS
from tests.closed_forms import anisotropic_gaussian, two_modes
from tests.judge import assert_agree, assert_close, with_gradients
from tests.test_flow import BROAD, GRIDS, STACKS, as_reference, stack

F64 = torch.float64
LEADS = [(), (3,), (2, 1, 5), (0,), (3, 0)]
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def called(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The same velocity as a function, whose layers the library cannot see."""
    return lambda x, t, cond: module(x, t, cond)


def true_jacobian(velocity: Any, x0: Tensor, cond: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The plain maths in float64."""
    spread = None if cond is None else cond.double().expand(*x0.shape[:-1], cond.shape[-1])
    return fdkernels_ref.flow_jacobian(velocity, x0.double(), spread, **options)


def off(out: Tensor, truth: Tensor) -> float:
    """The relative error."""
    return ((out.double() - truth).norm() / truth.norm()).item()


# -- the Jacobian ----------------------------------------------------------------------------------------------------


@given(
    net=STACKS,
    d=st.sampled_from([1, 2, 7]),
    cond_dim=st.integers(0, 3),
    order=st.permutations(["cond", "x", "t"]),
    lead=st.sampled_from(LEADS),
    shared=st.sampled_from(["own", "shared", "row"]),
    transposed=st.booleans(),
    method=st.sampled_from(list(METHODS)),
    time_grid=st.sampled_from(GRIDS),
    clip=st.sampled_from([None, (-1.0, 1.0), (-0.3, 0.5)]),
)
def test_any_network_and_solver(
    net: dict[str, Any],
    d: int,
    cond_dim: int,
    order: list[str],
    lead: tuple[int, ...],
    shared: str,
    transposed: bool,
    method: str,
    time_grid: list[float] | None,
    clip: tuple[float, float] | None,
) -> None:
    order = [name for name in order if cond_dim or name != "cond"]
    module = stack(cond_dim + d + 1, outputs=d, **net).double()
    x0 = torch.randn(*lead, d, dtype=F64)
    cond_lead = {"own": lead, "shared": (*lead[:-1], 1) if lead else (), "row": ()}[shared]
    cond = torch.randn(*cond_lead, cond_dim, dtype=F64) if cond_dim else None
    if transposed and len(lead) > 1:
        x0 = x0.mT.contiguous().mT
    options = {"num_steps": 2, "method": method, "time_grid": time_grid, "clip": clip}
    theirs = true_jacobian(as_reference(module, order), x0, cond, **options)
    for velocity in (fdkernels.pack_mlp(module, order), as_reference(module, order)):
        ours = fdkernels.flow_jacobian(velocity, x0, cond, **options)
        assert not any(part.requires_grad for part in ours)
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("norms", BROAD)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast", "bfloat16", "float16"])
def test_precision(kind: str, activation: str, norms: str) -> None:
    """float32; bf16 by argument, by autocast and by weights; float16; judged by the reference in the same precision."""
    torch.manual_seed(list(ACTIVATIONS).index(activation))
    net = stack(5 + 3 + 1, (64, 48), 3, ACTIVATIONS[activation].module, BROAD[norms])
    for linear in net:
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
    low = {"float32": torch.float32, "float16": torch.float16}.get(kind, torch.bfloat16)
    stored = low if kind in ("bfloat16", "float16") else torch.float32
    x0, cond, net = torch.randn(32, 2, 3).to(low).float(), torch.randn(32, 1, 5).to(low).float(), net.to(low).float()
    options = {"method": "heun", "num_steps": 4, "clip": None}
    order = ("cond", "x", "t")

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        velocity = as_reference(copy.deepcopy(net).to(dtype), order)
        return fdkernels_ref.flow_jacobian(velocity, x0.to(dtype), cond.to(dtype).expand(32, 2, 5), **options)

    truth, plain = reference(F64), reference(low)
    stored_net = copy.deepcopy(net).to(stored)
    for velocity in (fdkernels.pack_mlp(stored_net, order), as_reference(stored_net, order)):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            end, jacobian = fdkernels.flow_jacobian(
                velocity, x0.to(stored), cond.to(stored), precision="bf16" if kind == "bf16" else None, **options
            )
        assert (end.dtype, jacobian.dtype) == (stored, torch.float32)
        assert_close("end", end.to(low), truth[0], plain[0], "torch", size=truth[0])
        kinks = activation == "relu"  # where rounding moves a unit across one, J jumps
        if low == torch.float32:
            errors = (jacobian - truth[1]).norm(dim=(-2, -1)).flatten()
            rows = errors.argsort()[: len(errors) - kinks]  # 57,000 units, of which rarely one is that near
            jacobian, exact, usual = (part.flatten(0, 1)[rows] for part in (jacobian, truth[1], plain[1]))
            assert_close("J", jacobian, exact, usual, "torch", size=exact)
        else:
            assert off(jacobian, truth[1]) < min(2 * off(plain[1], truth[1]), 0.1 if kinks else 0.02)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_the_derivatives(activation: str, dtype: torch.dtype) -> None:
    """Within some roundings of 1 (as PyTorch's own, which overflow for GELU above 1e12); NaN stays NaN."""
    h = torch.cat([torch.linspace(-12, 12, 1009), torch.logspace(-30, 12, 7), -torch.logspace(-30, 12, 7)])
    h = torch.cat([h, torch.tensor([0.0, torch.nan])]).to(dtype)
    exact = h.double().requires_grad_()
    (slopes,) = torch.autograd.grad(ACTIVATIONS[activation].module()(exact).sum(), exact)
    slope = ACTIVATIONS[activation].slope(h)
    assert slope.dtype == dtype
    assert slope[-1].isnan()
    assert ((slope[:-1] - slopes[:-1]).abs() < 12 * torch.finfo(dtype).eps).all()


LAYERS = {
    "both norms": [nn.Linear(6, 5), nn.LayerNorm(5), nn.SiLU(), nn.LayerNorm(5), nn.Linear(5, 2)],
    "plain norm": [nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Tanh(), nn.Linear(5, 2)],
    "norm alone": [nn.Linear(6, 5), nn.LayerNorm(5, bias=False), nn.Linear(5, 2, bias=False)],
    "wide eps": [nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5, eps=0.5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)],
    "linear": [nn.Linear(6, 2)],
}


@pytest.mark.parametrize("layers", LAYERS)
def test_odd_layers(layers: str) -> None:
    module, x0, cond = nn.Sequential(*LAYERS[layers]).double(), torch.randn(4, 2, dtype=F64), torch.randn(3, dtype=F64)
    ours = fdkernels.flow_jacobian(fdkernels.pack_mlp(module), x0, cond, num_steps=3, method="rk4")
    theirs = true_jacobian(as_reference(module, ("cond", "x", "t")), x0, cond, num_steps=3, method="rk4")
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_module_packed_and_function_are_one_velocity() -> None:
    flow, x0 = fdkernels.VelocityMLP(3, 2, (16, 8), layer_norm=True), torch.randn(6, 4, 2)
    cond = torch.randn(6, 1, 3)
    exact = true_jacobian(copy.deepcopy(flow).double(), x0, cond)
    module, packed, function = (
        fdkernels.flow_jacobian(velocity, x0, cond)
        for velocity in (flow, fdkernels.pack_mlp(flow.net, flow.order), called(flow))
    )
    assert all(map(torch.equal, module, packed))
    assert_agree(module, function, exact)


def test_end_is_that_of_the_flow() -> None:
    flow, x0, cond = (
        fdkernels.VelocityMLP(3, 2, (16,)).double(),
        2 * torch.randn(50, 2, dtype=F64),
        torch.randn(3).double(),
    )
    for velocity in (flow, called(flow)):
        for clip in (None, (-0.5, 0.25), (-1e300, 1e300), (-math.inf, 0.0)):
            end, jacobian = fdkernels.flow_jacobian(velocity, x0, cond, clip=clip)
            torch.testing.assert_close(end, fdkernels.integrate_flow(velocity, x0, cond, clip=clip))
            torch.testing.assert_close(jacobian, fdkernels.flow_jacobian(velocity, x0, cond, clip=None)[1])


def test_bounds_beyond_the_dtype_do_not_bind() -> None:
    x0 = torch.randn(3, 2, dtype=torch.float16)
    ends = [fdkernels.flow_jacobian(lambda x, t, c: -x, x0, clip=clip)[0] for clip in (None, (-1e30, 1e30))]
    assert torch.equal(*ends)


def test_a_flow_and_its_inverse_compose_to_the_identity() -> None:
    mixture, x0, grid = two_modes(3), torch.randn(5, 3, dtype=F64), torch.linspace(0, 1, 201, dtype=F64)
    options = {"method": "rk4", "clip": None}
    end, forth = fdkernels.flow_jacobian(mixture.velocity, x0, time_grid=grid, **options)
    start, back = fdkernels.flow_jacobian(mixture.velocity, end, time_grid=grid.flip(0), **options)
    torch.testing.assert_close(start, x0, rtol=0, atol=1e-7)
    torch.testing.assert_close(back @ forth, torch.eye(3, dtype=F64).expand(5, 3, 3), rtol=0, atol=1e-6)
    assert (forth - torch.eye(3)).norm() > 1


def test_log_density_of_a_gaussian() -> None:
    gaussian, x0 = anisotropic_gaussian(3), torch.randn(6, 3, dtype=F64)
    action, jacobian = fdkernels.flow_jacobian(gaussian.velocity, x0, num_steps=100, method="rk4", clip=None)
    log_noise = -0.5 * (x0**2 + math.log(2 * math.pi)).sum(-1)
    log_p = log_noise - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_p, gaussian.log_prob_t(action, 1.0), rtol=0, atol=1e-6)


def test_what_a_callable_gets() -> None:
    cond, seen = torch.randn(5, 1, 3), []

    def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.append((tuple(x.shape), tuple(t.shape), tuple(c.shape), t.dtype))
        assert torch.equal(c, cond.expand(2, 5, 4, 3))
        return x

    fdkernels.flow_jacobian(velocity, torch.randn(5, 4, 2), cond, num_steps=1)
    assert seen == [((2, 5, 4, 2), (2, 5, 4, 1), (2, 5, 4, 3), torch.float32)]


def test_the_condition_is_multiplied_once() -> None:
    flow, linear, rows = fdkernels.VelocityMLP(4, 3, hidden=(16,)).double(), torch.nn.functional.linear, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[-1] == 4:
            rows.append(x.numel() // 4)
        return linear(x, weight, bias)

    with mock.patch("torch.nn.functional.linear", counted):
        fdkernels.flow_jacobian(flow, torch.randn(5, 7, 3, dtype=F64), torch.randn(5, 1, 4, dtype=F64))
    assert rows == [5]


# -- velocities without a gradient -----------------------------------------------------------------------------------


def without_gradient(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    with torch.no_grad():
        return -x


@pytest.mark.parametrize("velocity", [without_gradient, lambda x, t, cond: -x.detach(), lambda x, t, cond: cond])
@pytest.mark.parametrize("grad", [False, True])
def test_a_velocity_without_a_gradient_is_refused(grad: bool, velocity: Any) -> None:
    x = torch.randn(3, 2)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="flow_jacobian: velocity must be differentia"):
        fdkernels.flow_jacobian(velocity, x, x)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="flow_pullback_penalty: velocity must be diff"):
        fdkernels.flow_pullback_penalty(velocity, x, x, x)


def test_a_velocity_that_does_not_depend_on_the_state() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    _, jacobian = fdkernels.flow_jacobian(lambda x, t, c: c @ weight.T, torch.randn(4, 2), torch.randn(4, 3))
    assert torch.equal(jacobian, torch.eye(2).expand(4, 2, 2))
    assert weight.grad is None


# -- the penalty of given Jacobians ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d", "k"), [(1, 1), (1, 5), (2, 3), (7, 1), (7, 5)])
@pytest.mark.parametrize("normalize", ["trace", "none"])
def test_penalty(normalize: str, d: int, k: int, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """Computed in float64 whatever the inputs are, so that only the results are rounded."""
    inputs = torch.randn(*lead, d).to(dtype), torch.randn(*lead, k, d, d).to(dtype)
    options = {"damping": 0.1, "normalize": normalize}
    truth = with_gradients(
        lambda x, j: fdkernels_ref.pullback_penalty(x, j, **options), tuple(x.double() for x in inputs)
    )
    ours = with_gradients(lambda x, j: fdkernels.pullback_penalty(x, j, **options), inputs)
    assert ours[0].dtype == (F64 if dtype == F64 else torch.float32)
    for i, (out, exact) in enumerate(zip(ours, truth)):
        eps = torch.finfo(out.dtype).eps
        bar = 1e-9 if out.dtype == F64 else 2 * eps
        # with d = 1 the normalised penalty does not depend on J, so that its gradient is only rounding
        smallest = torch.finfo(out.dtype).smallest_normal * eps
        torch.testing.assert_close(
            out.double(), exact, rtol=bar, atol=max(1e-12, smallest), msg=lambda text, i=i: f"{i}: {text}"
        )


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 6),
    d=st.integers(1, 9),
    damping=st.sampled_from([1e-3, 2.0]),
    eps=st.sampled_from([1e-6, 10.0]),
    normalize=st.sampled_from(["trace", "none"]),
    transposed=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_penalty_anywhere(
    lead: list[int], k: int, d: int, damping: float, eps: float, normalize: str, transposed: bool, reduction: str
) -> None:
    displacement, jacobian = torch.randn(*lead, d, dtype=F64), torch.randn(*lead, k, d, d, dtype=F64)
    if transposed:
        jacobian = jacobian.mT.contiguous().mT
        displacement = displacement.repeat_interleave(2, -1)[..., ::2]
    options = {"damping": damping, "eps": eps, "normalize": normalize, "reduction": reduction}
    ours = fdkernels.pullback_penalty(displacement, jacobian, **options)
    theirs = fdkernels_ref.pullback_penalty(displacement, jacobian, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("normalize", ["trace", "none"])
@pytest.mark.parametrize("eps", [1e-6, 1e3])
def test_penalty_gradients_of_two_orders(normalize: str, eps: float) -> None:
    def penalty(displacement: Tensor, jacobian: Tensor) -> Tensor:
        return fdkernels.pullback_penalty(displacement, jacobian, damping=0.3, normalize=normalize, eps=eps)

    inputs = torch.randn(2, 3, dtype=F64, requires_grad=True), torch.randn(2, 2, 3, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


def test_eps_takes_over_where_the_trace_is_small() -> None:
    """Its value, and the gradient of J, which then does not see the trace."""
    jacobian = torch.stack([10 * torch.eye(2), 0.1 * torch.eye(2)]).double().unsqueeze(1).requires_grad_()
    displacement = torch.ones(2, 2, dtype=F64)
    penalty = fdkernels.pullback_penalty(displacement, jacobian, damping=0.0, eps=0.1)  # tr M/d: 0.01 and 100
    torch.testing.assert_close(penalty.detach(), torch.tensor([0.01 / 0.1, 1.0], dtype=F64))
    (gradient,) = torch.autograd.grad(penalty.sum(), jacobian)
    torch.testing.assert_close(gradient[0, 0], torch.full((2, 2), -0.01, dtype=F64))  # −2·M²·J·δδᵀ/(ε·d), symmetric


def test_mixed_dtypes() -> None:
    displacement, jacobian = torch.randn(4, 3), torch.randn(4, 2, 3, 3)
    expected = fdkernels_ref.pullback_penalty(displacement.double(), jacobian.half().double())
    for δ, dtype in ((displacement, torch.float32), (displacement.double(), F64)):
        penalty = fdkernels.pullback_penalty(δ, jacobian.half())
        assert penalty.dtype == dtype
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


def test_a_bad_row_stays_alone() -> None:
    """In the penalty and in both gradients."""
    displacement, jacobian = torch.randn(5, 3), torch.randn(5, 2, 3, 3)
    clean = with_gradients(fdkernels.pullback_penalty, (displacement, jacobian))
    jacobian, displacement = jacobian.clone(), displacement.clone()
    jacobian[1, 0, 2, 1], jacobian[2, 1, 0, 0], displacement[4, 0] = torch.nan, torch.inf, torch.nan
    for out, right in zip(with_gradients(fdkernels.pullback_penalty, (displacement, jacobian)), clean):
        assert torch.equal(out[[0, 3]], right[[0, 3]])
    assert fdkernels.pullback_penalty(displacement, jacobian)[[1, 2, 4]].isnan().all()


SINGULAR = {
    "nothing": torch.zeros(2, 2),
    "one direction": torch.tensor([[3.0, 0.0], [0.0, 0.0]]),
    "rank one": torch.ones(2, 2),
    "rank one, rounded": torch.tensor([[0.3, 0.1], [0.9, 0.3]], dtype=F64),
    "rank two": torch.arange(9.0).reshape(3, 3),
    "infinite": torch.tensor([[torch.inf]]),
}


@pytest.mark.parametrize("case", SINGULAR)
@pytest.mark.parametrize("normalize", ["trace", "none"])
def test_a_singular_covariance_has_no_inverse(normalize: str, case: str) -> None:
    """NaN rather than what rounding makes of 1/0; the other sample and the other row do not hide it or suffer."""
    flat, d = SINGULAR[case], len(SINGULAR[case])
    sound = torch.eye(d, dtype=flat.dtype)
    jacobian = torch.stack([torch.stack([flat, sound]), torch.stack([sound, sound])])
    displacement = torch.ones(2, d, dtype=flat.dtype)
    penalty = fdkernels.pullback_penalty(displacement, jacobian, damping=0.0, normalize=normalize)
    assert penalty[0].isnan()
    assert penalty[1] == 1
    if flat.isfinite().all():
        assert fdkernels.pullback_penalty(displacement, jacobian, normalize=normalize).isfinite().all()


def test_scales_that_differ_widely_are_not_singular() -> None:
    """Twenty orders of magnitude of variance along the axes, and six along any axes."""
    displacement, jacobian = torch.eye(2, dtype=F64), torch.diag(torch.tensor([1.0, 1e-10], dtype=F64))
    penalty = fdkernels.pullback_penalty(displacement, jacobian.expand(2, 1, 2, 2), damping=0.0, normalize="none")
    torch.testing.assert_close(penalty, torch.tensor([0.5, 0.5e20], dtype=F64))
    turned = torch.linalg.qr(torch.randn(2, 2, dtype=F64))[0] @ torch.diag(torch.tensor([1.0, 1e-3], dtype=F64))
    penalty = fdkernels.pullback_penalty(displacement, turned.expand(2, 1, 2, 2), damping=0.0, normalize="none")
    expected = torch.linalg.solve(turned, displacement.mT).square().mean(0)
    torch.testing.assert_close(penalty, expected, rtol=1e-8, atol=0)


# -- the penalty under a flow ----------------------------------------------------------------------------------------


@given(
    net=STACKS,
    d=st.sampled_from([1, 2, 7]),
    k=st.sampled_from([1, 3, 5]),
    lead=st.sampled_from(LEADS),
    t=st.sampled_from([0, 0.5, 0.8]),
    num_steps=st.integers(1, 3),
    method=st.sampled_from(list(METHODS)),
    normalize=st.sampled_from(["trace", "none"]),
    transposed=st.booleans(),
)
def test_flow_penalty_anywhere(
    net: dict[str, Any],
    d: int,
    k: int,
    lead: tuple[int, ...],
    t: float,
    num_steps: int,
    method: str,
    normalize: str,
    transposed: bool,
) -> None:
    module = stack(2 + d + 1, outputs=d, **net).double()
    cond, action = torch.randn(*lead, 2, dtype=F64), torch.randn(*lead, d, dtype=F64)
    bridge, displacement = torch.randn(*lead, k, d, dtype=F64), torch.randn(*lead, d, dtype=F64)
    if transposed:
        bridge = bridge.mT.contiguous().mT
        action = action.repeat_interleave(2, -1)[..., ::2]
    options = {"t": t, "num_steps": num_steps, "method": method, "normalize": normalize, "bridge_noise": bridge}
    plain = as_reference(module, ("cond", "x", "t"))
    truth = with_gradients(
        lambda δ: fdkernels_ref.flow_pullback_penalty(plain, cond, action, δ, **options), (displacement,)
    )
    for velocity in (fdkernels.pack_mlp(module), plain):
        ours = with_gradients(
            functools.partial(fdkernels.flow_pullback_penalty, velocity, cond, action, **options), (displacement,)
        )
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["float32", "bf16", "bfloat16", "float16"])
@pytest.mark.parametrize("function", [False, True])
def test_flow_penalty_in_other_precisions(function: bool, kind: str) -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16, 16))
    low = {"float32": torch.float32, "float16": torch.float16}.get(kind, torch.bfloat16)
    stored = low if kind in ("bfloat16", "float16") else torch.float32
    flow = flow.to(low).float()
    cond, action, displacement = (torch.randn(20, n).to(low).float() for n in (4, 3, 3))
    bridge = torch.randn(20, 2, 3).to(low).float()

    def reference(dtype: torch.dtype) -> Tensor:
        velocity = copy.deepcopy(flow).to(dtype)
        times = [0.75, 0.875, 1.0]
        view = 0.25 * bridge.to(dtype) + 0.75 * action.to(dtype).unsqueeze(1)
        _, jacobian = fdkernels_ref.flow_jacobian(
            velocity, view, cond.to(dtype).unsqueeze(1).expand(20, 2, 4), time_grid=times
        )
        return fdkernels_ref.pullback_penalty(displacement.double(), 0.25 * jacobian.double())

    velocity = copy.deepcopy(flow).to(stored)
    penalty = fdkernels.flow_pullback_penalty(
        called(velocity) if function else velocity, cond.to(stored), action.to(stored), displacement.to(stored),
        t=0.75, bridge_noise=bridge.to(stored), precision="bf16" if kind == "bf16" else None,
    )  # fmt: skip
    assert penalty.dtype == torch.float32
    truth = reference(F64)
    assert_close(kind, penalty.to(low), truth, reference(low), "torch", size=truth)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.8])
def test_flow_penalty_of_a_gaussian(t: float) -> None:
    """Σ⁻¹ + (t/(1 − t))²·I for any action and noise."""
    gaussian, displacement = anisotropic_gaussian(3), torch.randn(4, 3, dtype=F64)
    penalty, jacobian = fdkernels.flow_pullback_penalty(
        gaussian.velocity, torch.zeros(4, 1, dtype=F64), torch.randn(4, 3, dtype=F64), displacement,
        t=t, num_steps=100, method="rk4", damping=0.0, normalize="none", return_jacobian=True,
    )  # fmt: skip
    metric = torch.linalg.inv(gaussian.covariance) + (t / (1 - t)) ** 2 * torch.eye(3, dtype=F64)
    expected = torch.einsum("bi,ij,bj->b", displacement, metric, displacement) / 3
    torch.testing.assert_close(penalty, expected, rtol=1e-7, atol=0)
    covariances = (jacobian @ jacobian.mT).expand(4, 2, 3, 3)
    torch.testing.assert_close(covariances, torch.linalg.inv(metric).expand(4, 2, 3, 3), rtol=1e-6, atol=1e-9)


def penalty_case(rows: int = 5, k: int = 4) -> tuple[fdkernels.VelocityMLP, Tensor, Tensor, Tensor, Tensor]:
    """flow, cond, action, displacement, bridge_noise in float64."""
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16, 8)).double()
    cond, action, displacement = (torch.randn(rows, n, dtype=F64) for n in (4, 3, 3))
    return flow, cond, action, displacement, torch.randn(rows, k, 3, dtype=F64)


@pytest.mark.parametrize("function", [False, True])
def test_returned_jacobians_are_those_of_the_penalty(function: bool) -> None:
    flow, cond, action, displacement, bridge = penalty_case()
    velocity = called(flow) if function else flow
    options = {"damping": 0.1, "normalize": "none", "reduction": "mean"}
    penalty, jacobian = fdkernels.flow_pullback_penalty(
        velocity, cond, action, displacement, bridge_noise=bridge, return_jacobian=True, **options
    )
    assert jacobian.shape == (5, 4, 3, 3)
    assert not jacobian.requires_grad
    torch.testing.assert_close(penalty, fdkernels.pullback_penalty(displacement, jacobian, **options))
    view = 0.2 * bridge + 0.8 * action.unsqueeze(1)
    _, from_view = fdkernels.flow_jacobian(velocity, view, cond.unsqueeze(1), time_grid=[0.8, 0.9, 1.0])
    torch.testing.assert_close(jacobian, 0.2 * from_view)


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("return_jacobian", [False, True])
def test_the_displacement_alone_gets_a_gradient(return_jacobian: bool, function: bool) -> None:
    flow, *tensors = penalty_case()
    cond, action, displacement, bridge = (x.requires_grad_() for x in tensors)
    out = fdkernels.flow_pullback_penalty(
        called(flow) if function else flow, cond, action, displacement, bridge_noise=bridge,
        return_jacobian=return_jacobian,
    )  # fmt: skip
    (out[0] if return_jacobian else out).sum().backward()
    assert displacement.grad is not None
    assert all(x.grad is None for x in (cond, action, bridge, *flow.parameters()))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_seeded_noise_is_the_documented_one(as_tensor: bool) -> None:
    flow, cond, action, displacement, _ = penalty_case(rows=6)
    call = functools.partial(fdkernels.flow_pullback_penalty, flow, cond, action, displacement, num_samples=5)
    ours = call(seed=torch.tensor(11) if as_tensor else 11)
    bridge = philox_normal(11, (6, 5, 3), "cpu", F64)
    torch.testing.assert_close(ours, fdkernels_ref.flow_pullback_penalty(
        flow, cond, action, displacement, bridge_noise=bridge
    ))  # fmt: skip
    torch.manual_seed(99)
    assert torch.equal(ours, call(seed=11))
    assert not torch.equal(ours, call(seed=12))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_is_drawn_comes_from_the_generator(dtype: torch.dtype) -> None:
    """In the dtype of the states, whatever that of the rest is; without a generator, from PyTorch's own."""
    _, cond, action, displacement, _ = penalty_case()
    call = functools.partial(
        fdkernels.flow_pullback_penalty, two_modes(3).velocity, cond.to(dtype), action, displacement
    )
    bridge = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=dtype)
    found = call(generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, call(bridge_noise=bridge))
    assert not torch.equal(found, call(generator=torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    assert torch.equal(found, call())


def test_given_noise_counts_the_samples() -> None:
    flow, cond, action, displacement, bridge = penalty_case(k=3)
    call = functools.partial(fdkernels.flow_pullback_penalty, flow, cond, action, displacement, bridge_noise=bridge)
    assert torch.equal(call(), call(num_samples=7))
    assert call(return_jacobian=True)[1].shape == (5, 3, 3, 3)


@pytest.mark.parametrize("function", [False, True])
def test_bad_rows_of_a_flow_stay_alone(function: bool) -> None:
    flow, cond, action, displacement, bridge = penalty_case()
    velocity = called(flow) if function else flow
    clean = fdkernels.flow_pullback_penalty(velocity, cond, action, displacement, bridge_noise=bridge)
    action[1, 0], cond[2, 3], bridge[3, 1, 2] = torch.nan, torch.nan, torch.nan
    penalty = fdkernels.flow_pullback_penalty(velocity, cond, action, displacement, bridge_noise=bridge)
    torch.testing.assert_close(penalty[[0, 4]], clean[[0, 4]], rtol=1e-12, atol=0)
    assert penalty[1:4].isnan().all()


# -- where it runs ---------------------------------------------------------------------------------------------------


def everything(velocity: Any, cond: Tensor, action: Tensor, displacement: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """What all three functions give."""
    end, jacobian = fdkernels.flow_jacobian(velocity, action, cond, num_steps=3, method="heun", **options)
    given = fdkernels.pullback_penalty(displacement, jacobian.unsqueeze(-3), damping=0.1)
    penalty = fdkernels.flow_pullback_penalty(velocity, cond, action, displacement, seed=3, **options)
    return end, jacobian, given, penalty


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: Any, function: bool) -> None:
    flow, *tensors, _ = penalty_case()
    velocity = called(flow) if function else flow
    expected = everything(velocity, *tensors)
    with mode():
        found = everything(velocity, *(x.clone() for x in tensors))
        assert not any(x.requires_grad for x in found)
    assert all(map(torch.equal, found, expected))


def test_inference_tensors_that_a_velocity_keeps_for_its_gradient() -> None:
    with torch.inference_mode():
        cond = torch.tensor([2.0, 3.0])
        _, jacobian = fdkernels.flow_jacobian(lambda x, t, c: x * c, torch.ones(2), cond, num_steps=1)
        assert torch.equal(jacobian, torch.diag(1 + cond))


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low: torch.dtype, function: bool) -> None:
    """It lowers the velocity's products alone: what is asked for in full precision, or in float64, stays as it is."""
    flow, *tensors, _ = penalty_case()
    velocity = called(flow) if function else flow
    expected = everything(velocity, *tensors)
    with torch.autocast("cpu", low):
        assert all(map(torch.equal, everything(velocity, *tensors), expected))
    flow.float()
    tensors = [x.float() for x in tensors]
    expected = everything(velocity, *tensors)
    with torch.autocast("cpu", low):
        assert all(map(torch.equal, everything(velocity, *tensors, precision="highest"), expected))
        rough = everything(velocity, *tensors)
        for dtype in (torch.bfloat16, torch.float16):  # joins of unlike dtypes
            end, jacobian = fdkernels.flow_jacobian(lambda x, t, c: -x, tensors[1].to(dtype))
            assert (end.dtype, jacobian.dtype) == (dtype, torch.float32)
    for out, full in zip(rough[1:], expected[1:]):
        error = (out - full).norm() / full.norm()
        assert 0 < error < (1 if out is rough[2] else 0.02)  # that one was given the rough Jacobian, and divides by it


def test_precisions_differ_where_they_should() -> None:
    flow, *tensors, _ = penalty_case(rows=64)
    flow, tensors = flow.float(), [x.float() for x in tensors]
    for velocity in (flow, called(flow)):
        full, high, low = (everything(velocity, *tensors, precision=p) for p in ("highest", "high", "bf16"))
        assert all(map(torch.equal, full, high))
        assert not torch.equal(low[1], full[1])
        assert_agree(low[1].bfloat16(), full[1].bfloat16(), full[1].double(), bar=1e-2)
        torch.set_float32_matmul_precision("medium")
        try:
            with pytest.raises(RuntimeError, match=r"flow_jacobian: precision='highest' on the PyTorch path needs"):
                everything(velocity, *tensors, precision="highest")
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", ["module", "packed", "function"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    flow, *tensors, _ = penalty_case()
    velocity = {"module": flow, "packed": fdkernels.pack_mlp(flow), "function": called(flow)}[kind]

    def run(cond: Tensor, action: Tensor, displacement: Tensor) -> tuple[Tensor, ...]:
        return everything(velocity, cond, action, displacement)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    cond, action, displacement = tensors
    for found, expected in zip(compiled(*tensors), run(*tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = []
    for call in (compiled, run):
        leaf = displacement.clone().requires_grad_()
        gradients += torch.autograd.grad(call(cond, action, leaf)[3].sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_a_compiled_velocity() -> None:
    """A module of layers that the library does not know, compiled: it allows one backward pass for each call."""
    flow, *tensors, _ = penalty_case()
    torch.compiler.reset()
    compiled = torch.compile(flow, backend="aot_eager")
    for found, expected in zip(everything(lambda *given: compiled(*given), *tensors), everything(flow, *tensors)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Trial(nn.Module):
    def __init__(self, flow: nn.Module, function: bool) -> None:
        super().__init__()
        self.flow, self.function = flow, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return everything(called(self.flow) if self.function else self.flow, *tensors)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("function", [False, True])
def test_vmap_over_stacked_weights(function: bool, layer_norm: bool) -> None:
    flows = [fdkernels.VelocityMLP(4, 3, (16, 16), layer_norm=layer_norm).double() for _ in range(3)]
    trials = [Trial(flow, function) for flow in flows]
    weights, buffers = torch.func.stack_module_state(trials)
    tensors = [torch.randn(3, 5, n, dtype=F64) for n in (4, 3, 3)]

    def run(weights: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(trials[0], (weights, buffers), tensors)

    together = torch.func.vmap(run)(weights, *tensors)
    for i, trial in enumerate(trials):
        for found, expected in zip(together, trial(*(x[i] for x in tensors))):
            torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together[1][0], together[1][1])


@pytest.mark.parametrize("function", [False, True])
def test_functional_gradients(function: bool) -> None:
    """Of the displacement; the flow stays a constant, also for a gradient in its weights."""
    flow, cond, action, displacement, bridge = penalty_case()
    trial = Trial(flow, function)

    def penalty(δ: Tensor) -> Tensor:
        velocity = called(flow) if function else flow
        return fdkernels.flow_pullback_penalty(velocity, cond, action, δ, bridge_noise=bridge, reduction="sum")

    leaf = displacement.clone().requires_grad_()
    (expected,) = torch.autograd.grad(penalty(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(penalty)(displacement), expected, rtol=1e-9, atol=1e-12)
    rows = torch.func.vmap(torch.func.grad(penalty))(torch.stack([displacement, 2 * displacement]))
    torch.testing.assert_close(rows, torch.stack([expected, 2 * expected]), rtol=1e-9, atol=1e-12)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return sum(x.sum() for x in torch.func.functional_call(trial, weights, (cond, action, displacement)))

    gradients = torch.func.grad(loss)(dict(trial.named_parameters()))
    assert all(not gradient.any() for gradient in gradients.values())


def test_an_optimiser_step_is_seen_by_the_next_call() -> None:
    flow, *tensors, _ = penalty_case()
    packed = fdkernels.pack_mlp(flow)
    before = everything(packed, *tensors)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.5)
    for found, old, fresh in zip(everything(packed, *tensors), before, everything(copy.deepcopy(flow), *tensors)):
        assert not torch.allclose(found, old)
        assert torch.equal(found, fresh)


# -- bad input -------------------------------------------------------------------------------------------------------

X, C, J, B = torch.randn(4, 6), torch.randn(4, 5), torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6)
FLOW = fdkernels.VelocityMLP(5, 6, hidden=(8,))
WIDE = fdkernels.VelocityMLP(5, 6, hidden=(8,)).double()


def solve(x0: Any = X, cond: Any = C, velocity: Any = FLOW, **options: Any) -> Any:
    return fdkernels.flow_jacobian(velocity, x0, cond, **options)


def weigh(displacement: Any = X, jacobian: Any = J, **options: Any) -> Any:
    return fdkernels.pullback_penalty(displacement, jacobian, **options)


def chain(cond: Any = C, action: Any = X, displacement: Any = X, velocity: Any = FLOW, **options: Any) -> Any:
    return fdkernels.flow_pullback_penalty(velocity, cond, action, displacement, **options)


BAD_JACOBIAN = {
    "no tensor": (lambda: solve([1.0]), TypeError, "x0 must be a torch.Tensor, got list"),
    "integers": (lambda: solve(X.long()), TypeError, "x0 must be float32.*int64"),
    "scalar": (lambda: solve(torch.tensor(1.0)), ValueError, r"x0 must be .* got \(\)"),
    "no dimension": (lambda: solve(X[:, :0]), ValueError, r"x0 must be .* d of at least 1, got \(4, 0\)"),
    "scalar cond": (lambda: solve(cond=torch.tensor(1.0)), ValueError, r"cond must be \(\.\.\., c\), got a scalar"),
    "cond rows": (lambda: solve(cond=C[:3]), ValueError, r"cond must broadcast .* x0's leading shape = \(4, 5\)"),
    "more cond": (lambda: solve(cond=C.expand(2, 4, 5)), ValueError, r"cond must broadcast .* got \(2, 4, 5\)"),
    "cond width": (lambda: solve(cond=C[:, :4]), ValueError, "width 5, got cond of width 4"),
    "no cond": (lambda: solve(cond=None), ValueError, "width 5, got cond of width 0"),
    "x width": (lambda: solve(X[:, :2]), ValueError, "6 dimensions, got x0 with d=2"),
    "x dtype": (lambda: solve(X.double()), ValueError, "weights are torch.float32, got x0 of torch.float64"),
    "cond dtype": (lambda: solve(cond=C.double()), ValueError, "weights are torch.float32, got cond of torch.float64"),
    "devices": (lambda: solve(cond=C.to("meta")), ValueError, "one device"),
    "steps": (lambda: solve(num_steps=0), ValueError, "num_steps must be an integer of at least 1, got 0"),
    "method": (lambda: solve(method="rk5"), ValueError, "method must be one of 'euler'"),
    "grid": (lambda: solve(time_grid=[0.0]), ValueError, "time_grid must hold two or more"),
    "grid text": (lambda: solve(time_grid="01"), TypeError, "time_grid must be a sequence of times, got str"),
    "clip": (lambda: solve(clip=(1, -1)), ValueError, "clip must be None or .* low <= high"),
    "velocity": (lambda: solve(velocity="flow"), TypeError, "velocity must be"),
    "its shape": (lambda: solve(velocity=lambda x, t, c: x[:2]), ValueError, "velocity must return x's shape"),
    "its type": (lambda: solve(velocity=lambda x, t, c: None), TypeError, "velocity's result must be a torch.Tensor"),
    "precision": (lambda: solve(precision="tf32"), ValueError, "precision must be one of"),
    "bf16 of float64": (lambda: solve(X.double(), C.double(), WIDE, precision="bf16"), ValueError, "less than float64"),
    "backend": (lambda: solve(backend="cuda"), ValueError, "backend must be one of"),
    "triton": (lambda: solve(backend="triton"), RuntimeError, "backend='triton'"),
    "triton of a function": (lambda: solve(velocity=len, backend="triton"), RuntimeError, "'triton' serves a Velocity"),
}  # fmt: skip
BAD_PENALTY = {
    "no tensor": (lambda: weigh([1.0]), TypeError, "displacement must be a torch.Tensor, got list"),
    "integers": (lambda: weigh(jacobian=J.long()), TypeError, "jacobian must be float32.*int64"),
    "sparse": (lambda: weigh(X.to_sparse()), TypeError, "displacement must be a dense tensor"),
    "scalar": (lambda: weigh(torch.tensor(1.0)), ValueError, r"displacement must be \(\.\.\., d\)"),
    "no dimension": (lambda: weigh(X[:, :0], J[..., :0, :0]), ValueError, "displacement must be .* d of at least 1"),
    "one sample": (lambda: weigh(jacobian=J[:, 0]), ValueError, r"jacobian must be .*K, d, d\).*got \(4, 6, 6\)"),
    "no samples": (lambda: weigh(jacobian=J[:, :0]), ValueError, "jacobian must be .* K of at least 1"),
    "a row": (lambda: weigh(jacobian=J[0, 0, 0]), ValueError, r"jacobian must be .* got \(6,\)"),
    "not square": (lambda: weigh(jacobian=J[..., :5]), ValueError, r"jacobian must be .* got \(4, 3, 6, 5\)"),
    "other d": (lambda: weigh(jacobian=J[..., :5, :5]), ValueError, r"jacobian .* displacement's d=6 .*\(4, 3, 5, 5\)"),
    "other rows": (lambda: weigh(jacobian=J[:2]), ValueError, r"jacobian .*leading shape \(4,\), got \(2, 3, 6, 6\)"),
    "no broadcast": (lambda: weigh(X[:1]), ValueError, r"jacobian .*leading shape \(1,\), got \(4, 3, 6, 6\)"),
    "devices": (lambda: weigh(jacobian=J.to("meta")), ValueError, "one device, got jacobian on meta"),
    "damping": (lambda: weigh(damping=-1e-3), ValueError, "damping must be finite and >= 0, got -0.001"),
    "damping nan": (lambda: weigh(damping=math.nan), ValueError, "damping must be finite"),
    "damping text": (lambda: weigh(damping="0"), TypeError, "damping must be a number, got '0'"),
    "eps": (lambda: weigh(eps=0.0), ValueError, "eps must be finite and > 0"),
    "normalize": (lambda: weigh(normalize="det"), ValueError, "normalize must be one of 'trace', 'none', got 'det'"),
    "reduction": (lambda: weigh(reduction="max"), ValueError, "reduction must be one of"),
}  # fmt: skip
BAD_CHAIN = {
    "no tensor": (lambda: chain([1.0]), TypeError, r"cond\[0\] must be a tensor, None, or a dict"),
    "no cond": (lambda: chain(None), ValueError, "wants a condition of width 5, got cond of width 0"),
    "integers": (lambda: chain(action=X.long()), TypeError, "action must be float32.*int64"),
    "cond rows": (lambda: chain(C[:2]), ValueError, r"cond must be .* leading shape \(4,\), got \(2, 5\)"),
    "scalar cond": (lambda: chain(torch.tensor(1.0)), ValueError, r"cond must be \(\.\.\., c\)"),
    "cond width": (lambda: chain(C[:, :4]), ValueError, "width 5, got cond of width 4"),
    "action": (lambda: chain(action=X[:, :5]), ValueError, r"action must be \(\.\.\., d\) = \(4, 6\), got \(4, 5\)"),
    "one action": (lambda: chain(action=X[0]), ValueError, r"action must be \(\.\.\., d\) = \(4, 6\), got \(6,\)"),
    "widths": (lambda: chain(C, X[:, :5], X[:, :5]), ValueError, "6 dimensions, got action with d=5"),
    "dtypes": (lambda: chain(action=X.double()), ValueError, "weights are torch.float32, got action of torch.float64"),
    "devices": (lambda: chain(displacement=X.to("meta")), ValueError, "one device, got displacement on meta"),
    "displacement": (lambda: chain(displacement=torch.tensor(1.0)), ValueError, r"displacement must be \(\.\.\., d\)"),
    "K": (lambda: chain(num_samples=0), ValueError, "num_samples must be an integer of at least 1, got 0"),
    "K half": (lambda: chain(num_samples=2.0), ValueError, "num_samples must be an integer"),
    "t": (lambda: chain(t=1.0), ValueError, r"t must be a number in \[0, 1\), got 1.0"),
    "t below": (lambda: chain(t=-0.1), ValueError, r"t must be a number in \[0, 1\), got -0.1"),
    "t nan": (lambda: chain(t=math.nan), ValueError, r"t must be a number in \[0, 1\)"),
    "t tensor": (lambda: chain(t=torch.tensor(0.5)), ValueError, r"t must be a number in \[0, 1\), got a tensor"),
    "steps": (lambda: chain(num_steps=0), ValueError, "num_steps must be an integer of at least 1"),
    "method": (lambda: chain(method="rk5"), ValueError, "method must be one of 'euler'"),
    "damping": (lambda: chain(damping=-1.0), ValueError, "damping must be finite"),
    "eps": (lambda: chain(eps=-1.0), ValueError, "eps must be finite"),
    "normalize": (lambda: chain(normalize=None), ValueError, "normalize must be one of"),
    "reduction": (lambda: chain(reduction="max"), ValueError, "reduction must be one of"),
    "bridge noise": (lambda: chain(bridge_noise=B[..., :5]), ValueError, r"bridge_noise must be \(\.\.\., K, d\)"),
    "its rows": (lambda: chain(bridge_noise=B[:2]), ValueError, r"bridge_noise must be .* got \(2, 3, 6\)"),
    "its samples": (lambda: chain(bridge_noise=B[:, :0]), ValueError, r"bridge_noise must be .* got \(4, 0, 6\)"),
    "its device": (lambda: chain(bridge_noise=B.to("meta")), ValueError, "one device, got bridge_noise on meta"),
    "its type": (lambda: chain(bridge_noise=B.tolist()), TypeError, "bridge_noise must be a torch.Tensor, got list"),
    "generator": (lambda: chain(generator=3), TypeError, "generator must be a torch.Generator, got int"),
    "seed and generator": (lambda: chain(seed=1, generator=torch.Generator()), ValueError, "seed and generator"),
    "wide seed": (lambda: chain(seed=2**64), ValueError, "seed must have 64 bits"),
    "seed text": (lambda: chain(seed="1"), TypeError, "seed must be an int or an integer tensor"),
    "return_jacobian": (lambda: chain(return_jacobian=1), TypeError, "return_jacobian must be True or False, got 1"),
    "velocity": (lambda: chain(velocity="flow"), TypeError, "velocity must be"),
    "its shape": (lambda: chain(velocity=lambda x, t, c: x[..., :2]), ValueError, "velocity must return x's shape"),
    "precision": (lambda: chain(precision="tf32"), ValueError, "precision must be one of"),
    "backend": (lambda: chain(backend="cuda"), ValueError, "backend must be one of"),
    "triton": (lambda: chain(backend="triton"), RuntimeError, "backend='triton'"),
}  # fmt: skip
BAD = [
    pytest.param(op, *case, id=f"{op}: {name}")
    for op, cases in (
        ("flow_jacobian", BAD_JACOBIAN), ("pullback_penalty", BAD_PENALTY), ("flow_pullback_penalty", BAD_CHAIN)
    )
    for name, case in cases.items()
]  # fmt: skip


@pytest.mark.parametrize(("op", "call", "error", "message"), BAD)
def test_bad_input(op: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """The message begins with the function's name, and names the argument."""
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        call()
