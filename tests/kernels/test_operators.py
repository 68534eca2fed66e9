"""The promises of torch.library: shapes without data, gradients of any order, compiling, vmap, autocast, capture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels
from tests.judge import BARS, assert_agree
from tests.kernels.device import BACKENDS, COMPILERS, DEVICE, INTERPRETED, on_gpu

OPERATORS = torch.ops.fdkernels
backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_(requires_grad)


@backends
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend: str, requires_grad: bool) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in fresh memory is not equal to itself
    triton = backend == "triton"
    displacement = draw(3, 2, 6, requires_grad=requires_grad)
    score, x = draw(3, 2, 4, 6, requires_grad=requires_grad), draw(3, 2, 4, 6).mul(2).requires_grad_(requires_grad)
    pairs = draw(3, 1, 1, 2, requires_grad=requires_grad)
    numbers = 1.5, -0.5, True
    settings = 1e-3, True, 1e-6
    check = torch.library.opcheck
    check(OPERATORS.fisher_penalty.default, (displacement, score, *settings, False, False, triton))
    check(
        OPERATORS.fisher_penalty.default, (displacement, score.mT.contiguous().mT, 0.1, False, 1.0, True, True, triton)
    )
    check(OPERATORS.velocity_to_score.default, (score, x, None, *numbers, triton))
    check(OPERATORS.velocity_to_score.default, (score, x, pairs, *numbers, triton))
    if triton:
        constants = score.detach(), x.detach(), pairs.detach()
        check(OPERATORS.velocity_fisher_penalty.default, (displacement, *constants, *numbers, *settings, False))
        upstream = draw(3, 2)
        rows = upstream, displacement.detach(), score.detach(), upstream, upstream
        check(OPERATORS.fisher_penalty_score_gradient.default, (*rows, *settings))


@pytest.mark.parametrize("normalize", ["trace", "none"])
@pytest.mark.parametrize("eps", [1e-6, 1e3])
def test_penalty_gradients_in_float64(normalize: str, eps: float) -> None:
    def penalty(displacement: Tensor, score: Tensor) -> Tensor:
        return fdkernels.fisher_penalty(displacement, score, normalize=normalize, eps=eps, backend="torch")

    inputs = draw(2, 3, dtype=torch.float64, requires_grad=True), draw(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, inputs)
    assert torch.autograd.gradgradcheck(penalty, inputs)


@pytest.mark.parametrize("path", ["linear", "linear_reversed", "vp", "cosine"])
def test_score_gradients_in_float64(path: str) -> None:
    def score(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return fdkernels.velocity_to_score(velocity, x, t, path=path, backend="torch")

    t = torch.tensor([[0.3], [0.7]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs = draw(2, 3, dtype=torch.float64, requires_grad=True), draw(2, 3, dtype=torch.float64, requires_grad=True), t
    assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradgradcheck(score, inputs)


@backends
def test_second_derivatives(backend: str) -> None:
    """``create_graph=True`` differentiates the plain formula, whose second derivative in δ is 2F̂/d."""
    displacement, score = draw(5, 6, requires_grad=True), draw(5, 4, 6)
    velocity, x = draw(5, 4, 6), draw(5, 4, 6) * 2
    direction = torch.ones_like(displacement)
    for penalty in (
        lambda δ: fdkernels.fisher_penalty(δ, score, backend=backend),
        lambda δ: fdkernels.velocity_fisher_penalty(δ, velocity, x, 0.5, backend=backend),
    ):
        (first,) = torch.autograd.grad(penalty(displacement).sum(), displacement, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), displacement)
        (along,) = torch.autograd.grad(penalty(direction.requires_grad_()).sum(), direction)
        error = (second - along).norm() / along.norm()
        assert error < BARS[torch.float32][backend]  # the penalty is quadratic


def chain(backend: str) -> Callable[..., Tensor]:
    def function(displacement: Tensor, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        score = fdkernels.velocity_to_score(velocity, x, 0.5, backend=backend)
        direct = fdkernels.velocity_fisher_penalty(displacement, velocity.detach(), x, t, backend=backend)
        penalty = fdkernels.fisher_penalty(displacement, score, reduction="mean", backend=backend)
        return penalty + direct.sum()

    return function


@backends
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_without_a_graph_break_for_any_size(compiler: str, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(chain(backend), fullgraph=True, dynamic=True, backend=compiler)
    for rows in (5, 9, 6):
        inputs = draw(rows, 6, requires_grad=True), draw(rows, 4, 6, requires_grad=True)
        constants = draw(rows, 4, 6), torch.full((rows, 1, 1), 0.5, device=DEVICE)
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (*inputs, *constants)]
        found = []
        for function, arguments in (
            (compiled, (*inputs, *constants)),
            (chain(backend), (*inputs, *constants)),
            (chain("torch"), exact),
        ):
            out = function(*arguments)
            found.append((out, *torch.autograd.grad(out, arguments[:2])))
        assert_agree(*found)


@backends
def test_vmap(backend: str) -> None:
    displacement, score, x = draw(5, 3, 6), draw(3, 5, 4, 6), draw(5, 4, 6)
    t = torch.full((5, 1, 1), 0.5, device=DEVICE)

    def both(displacement: Tensor, score: Tensor, x: Tensor, t: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
        return (
            fdkernels.fisher_penalty(displacement, score, backend=backend),
            fdkernels.velocity_to_score(score, x, t, backend=backend),
            fdkernels.velocity_fisher_penalty(displacement, score, x, t, backend=backend),
        )

    mapped = torch.func.vmap(both, in_dims=(1, 0, None, None))(displacement, score, x, t)
    looped = [both(displacement[:, i], score[i], x, t) for i in range(3)]
    for i, part in enumerate(mapped):
        exact = [tensor.double() for tensor in (displacement, score, x, t)]
        truth = torch.func.vmap(functools.partial(both, backend="torch"), in_dims=(1, 0, None, None))(*exact)[i]
        assert_agree(part, torch.stack([row[i] for row in looped]), truth)


def test_vmap_over_nothing() -> None:
    mapped = torch.func.vmap(functools.partial(fdkernels.fisher_penalty, backend="triton"))
    assert mapped(draw(0, 6), draw(0, 4, 6)).shape == (0,)


def test_functional_gradients() -> None:
    score = draw(5, 4, 6)

    def total(displacement: Tensor, backend: str) -> Tensor:
        return fdkernels.fisher_penalty(displacement, score, backend=backend, reduction="sum")

    displacement = draw(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(total(displacement, "torch"), displacement)
    exact, wide = score.double(), displacement.detach().double()
    truth = torch.func.grad(lambda δ: fdkernels.fisher_penalty(δ, exact, backend="torch", reduction="sum"))(wide)
    assert_agree(torch.func.grad(total)(displacement.detach(), "torch"), expected, truth)
    with pytest.raises(RuntimeError, match=r"fisher_penalty: torch.func gradients need backend='torch'"):
        torch.func.grad(total)(displacement.detach(), "triton")


@backends
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = draw(5, 6, requires_grad=True), draw(5, 4, 6, requires_grad=True), draw(5, 4, 6), draw(5, 1, 1) * 0 + 0.5
    expected = chain(backend)(*inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = chain(backend)(*inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@backends
def test_the_same_bits_every_time(backend: str) -> None:
    rows = 80 if INTERPRETED else 300
    inputs = draw(rows, 17, requires_grad=True), draw(rows, 5, 17, requires_grad=True)

    def run() -> tuple[Any, ...]:
        out = fdkernels.fisher_penalty(*inputs, backend=backend)
        return out, *torch.autograd.grad(out.sum(), inputs)

    for first, second in zip(run(), run()):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@backends
def test_only_what_is_asked_for(backend: str) -> None:
    """A constant score gets no gradient, and inference saves nothing for one."""
    displacement, score = draw(5, 6, requires_grad=True), draw(5, 4, 6)
    assert fdkernels.fisher_penalty(displacement, score, backend=backend).requires_grad
    with torch.inference_mode():
        outputs = OPERATORS.fisher_penalty(displacement, score, 1e-3, True, 1e-6, False, False, backend == "triton")
    assert [tuple(out.shape) for out in outputs] == [(5,), (0,), (0,)]


@on_gpu
def test_cuda_graph_capture() -> None:
    inputs = draw(256, 6, requires_grad=True), draw(256, 4, 6, requires_grad=True)
    constants = draw(256, 4, 6), draw(256, 1, 1) * 0 + 0.5
    function = chain("triton")

    def step() -> tuple[Tensor, ...]:
        out = function(*inputs, *constants)
        return out, *torch.autograd.grad(out, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(2)
    graph.replay()
    for replayed, eager in zip(captured, step()):
        torch.testing.assert_close(replayed, eager)


@on_gpu
def test_no_synchronisation() -> None:
    inputs = draw(256, 6, requires_grad=True), draw(256, 4, 6, requires_grad=True)
    constants = draw(256, 4, 6), draw(256, 1, 1) * 0 + 0.5
    torch.autograd.grad(chain("triton")(*inputs, *constants), inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(chain("triton")(*inputs, *constants), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets have 64 bits where necessary."""
    rows, num_samples, d = 2**24 + 7, 4, 33
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)
    score = torch.zeros(rows, num_samples, d, dtype=torch.bfloat16, device=DEVICE)
    displacement = torch.zeros(rows, d, dtype=torch.bfloat16, device=DEVICE)
    score[-3:], displacement[-3:] = 2.0, 1.0
    penalty = fdkernels.fisher_penalty(displacement, score, normalize="none", damping=0.0, backend="triton")
    assert penalty[-4:].tolist() == [0.0, 132.0, 132.0, 132.0]  # (2d)² / d
