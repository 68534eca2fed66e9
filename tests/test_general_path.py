"""Velocities that are no MLPs, or are called in another way: every operator takes them as callables v(x, t, cond)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from tests import zoo
from tests.judge import assert_agree, with_gradients

F64 = torch.float64
Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def in_rows(net: nn.Module) -> Velocity:
    """For a module that takes (rows, width) only, as a batch norm does."""

    def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return net(x.flatten(0, -2), t.flatten(0, -2), cond.flatten(0, -2)).view(x.shape)

    return velocity


def adapted(name: str, dtype: torch.dtype = F64) -> Velocity:
    """The network of that name as a velocity."""
    torch.manual_seed(1)
    if name in zoo.READABLE:
        readable = zoo.READABLE[name]
        return functools.partial(readable.call, readable.make().to(dtype).eval())
    net = zoo.UNREADABLE[name][0]().to(dtype).eval()
    return in_rows(net) if name == "batch norm" else net


NAMES = [*zoo.UNREADABLE, "by hand", "flat times", "strictly flat times"]


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_takes_it(name: str) -> None:
    """Values, and gradients to the displacement, against the plain maths in float64."""
    velocity = adapted(name)
    lead = (4,) if name in ("flat times", "strictly flat times") else (4, 2)
    x0, cond = torch.randn(*lead, zoo.D, dtype=F64), torch.randn(*lead, zoo.C, dtype=F64)
    for method in ("euler", "midpoint"):
        options = {"num_steps": 3, "method": method}
        torch.testing.assert_close(
            fdkernels.integrate_flow(velocity, x0, cond, **options),
            fdkernels_ref.integrate_flow(velocity, x0, cond, **options),
        )
        torch.testing.assert_close(
            fdkernels.flow_jacobian(velocity, x0, cond, **options),
            fdkernels_ref.flow_jacobian(velocity, x0, cond, **options),
        )


@pytest.mark.parametrize("name", [*zoo.UNREADABLE, "by hand"])
def test_every_penalty_takes_it(name: str) -> None:
    velocity = adapted(name)
    cond, displacement = torch.randn(5, zoo.C, dtype=F64), torch.randn(5, zoo.D, dtype=F64) / 10
    noise, bridge = torch.randn(2, 5, 3, zoo.D, dtype=F64)
    action = torch.rand(5, zoo.D, dtype=F64) - 0.5

    def fisher(library, δ: Tensor) -> Tensor:
        return library.flow_fisher_penalty(velocity, cond, δ, num_samples=3, noise=noise, bridge_noise=bridge)

    def pullback(library, δ: Tensor) -> Tensor:
        return library.flow_pullback_penalty(velocity, cond, action, δ, bridge_noise=bridge)

    for penalty in (fisher, pullback):
        ours, truth = (
            with_gradients(functools.partial(penalty, library), (displacement,))
            for library in (fdkernels, fdkernels_ref)
        )
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["residual", "sinusoidal", "FiLM", "learned time", "transformer"])
def test_weights_learn_through_the_solver(name: str) -> None:
    velocity = adapted(name)
    assert isinstance(velocity, nn.Module)
    parameters = list(velocity.parameters())
    x0, cond = torch.randn(4, zoo.D, dtype=F64), torch.randn(4, zoo.C, dtype=F64)

    def gradients(end: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(end.square().sum(), parameters)

    ours = fdkernels.integrate_flow(velocity, x0, cond, num_steps=3, differentiable=True)
    truth = fdkernels_ref.integrate_flow(velocity, x0, cond, num_steps=3)
    torch.testing.assert_close(gradients(ours), gradients(truth))


@pytest.mark.parametrize("name", ["residual", "sinusoidal", "FiLM", "learned time", "transformer"])
def test_float32_is_the_networks_own(name: str) -> None:
    x0, cond = torch.randn(8, zoo.D), torch.randn(8, zoo.C)
    velocity = adapted(name, torch.float32)
    truth = fdkernels_ref.integrate_flow(adapted(name), x0.double(), cond.double())
    plain = fdkernels_ref.integrate_flow(velocity, x0, cond)
    assert_agree(fdkernels.integrate_flow(velocity, x0, cond), plain, truth)


@pytest.mark.long("ten seconds")
def test_compiled_by_its_owner() -> None:
    net, cond, displacement = adapted("residual"), torch.randn(5, zoo.C, dtype=F64), torch.randn(5, zoo.D, dtype=F64)
    compiled = torch.compile(net, backend="aot_eager")
    bridge, action = torch.randn(5, 2, zoo.D, dtype=F64), torch.rand(5, zoo.D, dtype=F64)
    torch.testing.assert_close(
        fdkernels.integrate_flow(compiled, displacement, cond), fdkernels_ref.integrate_flow(net, displacement, cond)
    )
    ours, truth = (
        library.flow_pullback_penalty(velocity, cond, action, displacement, bridge_noise=bridge)
        for library, velocity in ((fdkernels, compiled), (fdkernels_ref, net))
    )
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


def test_kernels_are_not_pretended() -> None:
    """Who insists on the kernels is told that they serve MLPs only."""
    x0, cond = torch.randn(4, zoo.D, dtype=F64), torch.randn(4, zoo.C, dtype=F64)
    with pytest.raises(RuntimeError, match="serves a VelocityMLP or a packed MLP, and this velocity is neither"):
        fdkernels.integrate_flow(adapted("residual"), x0, cond, backend="triton")
