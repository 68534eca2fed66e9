"""Values and gradients of the three operators against the plain maths in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fdkernels
import fdkernels_ref
from fdkernels.kernels.penalty import launch
from fdkernels.kernels.penalty.kernel import penalty_kernel, score_gradient_kernel
from fdkernels.kernels.tuning.table import gpu_of
from fdkernels.kernels.tuning.tiles import penalty_tile
from fdkernels.records import PenaltyRule
from tests.judge import assert_close, with_gradients
from tests.kernels.device import BACKENDS, DEVICE, DTYPES, INTERPRETED, guarded, strided

# lead, K, d: sizes that are no powers of two nor multiples of anything; one number per row; several programs, the last
# not full; rows read in blocks of K, with blocks and rows that start at multiples of 16 bytes or not.
SHAPES = [
    ((5,), 4, 6), ((), 4, 6), ((256,), 4, 6), ((3, 1, 2), 5, 7), ((2,), 3, 17), ((3,), 1, 1), ((700,), 3, 1),
    ((3,), 4, 8), ((1,), 300, 5), ((2,), 256, 33), ((2,), 3, 1024), ((2,), 3, 1031), ((33,), 16, 60), ((1,), 2, 2051),
    ((1300,), 2, 2), ((5,), 33, 17), ((4,), 129, 6), ((3,), 515, 2),
    ((5,), 4, 125), ((5,), 16, 29), ((5,), 33, 5), ((5,), 64, 21),  # programs of few rows
]  # fmt: skip
# Each case is a compilation on a GPU, where every fourth shape is enough for a second half precision.
cases = pytest.mark.parametrize(
    ("lead", "num_samples", "d", "dtype"),
    [
        pytest.param(*shape, dtype, id=f"{'x'.join(map(str, (*shape[0], *shape[1:])))}-{str(dtype)[6:]}")
        for i, shape in enumerate(SHAPES)
        for dtype in DTYPES
        if INTERPRETED or dtype != torch.float16 or i % 4 == 0
    ],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
backends = pytest.mark.parametrize("backend", BACKENDS)
# tests/test_operators.py judges PyTorch on a CPU with these shapes, and the random shapes below do so too.
kernels = pytest.mark.parametrize("backend", BACKENDS[1:] if INTERPRETED else BACKENDS)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def judge_penalty(
    displacement: Tensor, score: Tensor, backend: str, layout: str = "contiguous", **settings: Any
) -> None:
    upstream = draw(displacement.shape[:-1], torch.float32, seed=7)
    dtype = torch.promote_types(displacement.dtype, score.dtype)  # the plain maths does not mix dtypes
    inputs = displacement.to(dtype), score.to(dtype)
    out = with_gradients(
        functools.partial(fdkernels.fisher_penalty, backend=backend, **settings),
        (strided(displacement, layout), strided(score, layout)),
        upstream.to(DEVICE),
    )
    reference = functools.partial(fdkernels_ref.fisher_penalty, **settings)
    truth = with_gradients(reference, tuple(tensor.double() for tensor in inputs), upstream.double())
    plain = with_gradients(reference, inputs, upstream)
    # The scores' gradient is a difference: rounding acts on its first term, (2/K)·(s·δ)δ over the denominator.
    first = dict(settings, normalize="none")
    size = with_gradients(
        functools.partial(fdkernels_ref.fisher_penalty, **first), tuple(t.double() for t in inputs), upstream.double()
    )[2]
    if settings.get("normalize", "trace") == "trace":
        trace = (
            score.double().square().sum((-2, -1)) / score.shape[-2] + settings.get("damping", 1e-3) * score.shape[-1]
        )
        size = size * (score.shape[-1] / trace.clamp(min=settings.get("eps", 1e-6)))[..., None, None]
    names = "penalty", "gradient to displacement", "gradient to score"
    for name, *tensors, part in zip(names, out, truth, plain, (truth[0], truth[1], size)):
        assert_close(name, *tensors, backend, part)


@cases
@kernels
def test_penalty_and_gradients(
    lead: tuple[int, ...], num_samples: int, d: int, dtype: torch.dtype, backend: str
) -> None:
    displacement, score = draw((*lead, d), dtype, 1), draw((*lead, num_samples, d), dtype, 2, scale=3)
    judge_penalty(displacement, score, backend)
    judge_penalty(displacement, score, backend, normalize="none", damping=0.1)


@pytest.mark.parametrize("d", [6, 8])
def test_more_numbers_than_32_bits_count(d: int) -> None:
    """The first program of launches over batches that no test has memory for: it only touches rows that are there."""
    tile = penalty_tile(gpu_of(DEVICE), "penalty", 4, d, 4)
    rows = 4 * tile.rows
    displacement, score = draw((rows, d), torch.float32, 1).to(DEVICE), draw((rows, 4, d), torch.float32, 2).to(DEVICE)
    rule = PenaltyRule(1e-3, True, 1e-6)
    wanted = launch.penalty(displacement, score, rule, True, True)
    wanted_of_score = launch.score_gradient(wanted[0], displacement, score, wanted[0], wanted[2], rule)
    fixed: dict[str, Any] = {"K": 4, "D": d, "TILE": tile, "NORMALIZE": True, "num_warps": tile.num_warps}
    for many in (2**31 // (4 * d) + 2, 2**31 // 4 + 2):
        out = [torch.empty_like(tensor) for tensor in wanted]
        of_score = torch.empty_like(score)
        penalty_kernel[(1,)](
            displacement, launch.Scores(score), *out, many, rule.damping, rule.eps, SCORE="given",
            COEFFICIENTS="scalar", **fixed,
        )  # fmt: skip
        score_gradient_kernel[(1,)](
            wanted[0], displacement, score, wanted[0], wanted[2], of_score, many, rule.eps, **fixed
        )
        for ours, theirs in zip((*out, of_score), (*wanted, wanted_of_score)):
            assert torch.equal(ours[: tile.rows], theirs[: tile.rows]), many


def judge_score(
    velocity: Tensor, x: Tensor, t: Tensor | float, backend: str, layout: str = "contiguous", **settings: Any
) -> None:
    upstream = draw(velocity.shape, torch.float32, seed=8)
    device_t = guarded(t) if isinstance(t, Tensor) else t
    ours = functools.partial(fdkernels.velocity_to_score, backend=backend, **settings)
    reference = functools.partial(fdkernels_ref.velocity_to_score, **settings)
    wide_t = t.double() if isinstance(t, Tensor) else t
    inputs = velocity, x
    out = with_gradients(
        lambda v, x: ours(v, x, device_t) + 0 * x, (strided(velocity, layout), strided(x, layout)), upstream.to(DEVICE)
    )
    truth = with_gradients(
        lambda v, x: reference(v, x, wide_t) + 0 * x, tuple(tensor.double() for tensor in inputs), upstream.double()
    )
    plain = with_gradients(lambda v, x: reference(v, x, t) + 0 * x, inputs, upstream)
    for name, *tensors in zip(("score", "gradient to velocity", "gradient to x"), out, truth, plain):
        assert_close(name, *tensors, backend, tensors[1])


@backends
@pytest.mark.parametrize("path", ["linear", "linear_reversed", "vp", "cosine"])
def test_score_along_each_path(path: str, backend: str) -> None:
    for dtype in DTYPES:
        velocity, x = (draw((5, 4, 6), dtype, seed) for seed in (3, 4))
        judge_score(velocity, x, 0.625, backend, path=path)
        judge_score(velocity, x, torch.linspace(0.25, 0.75, 20, dtype=dtype).view(5, 4, 1), backend, path=path)


@cases
@kernels
def test_score_and_gradients(lead: tuple[int, ...], num_samples: int, d: int, dtype: torch.dtype, backend: str) -> None:
    velocity, x = (draw((*lead, num_samples, d), dtype, seed) for seed in (3, 4))
    judge_score(velocity, x, 0.625, backend)
    judge_score(velocity, x, (0.125 + 0.75 * draw((*lead, num_samples, 1), torch.float32).sigmoid()).to(dtype), backend)


@dtypes
@backends
def test_velocity_convention_does_not_read_x(dtype: torch.dtype, backend: str) -> None:
    velocity = draw((5, 3, 7), dtype)
    x = torch.full_like(velocity, torch.nan)
    for t in (0.75, torch.full((5, 1, 1), 0.75)):
        score = fdkernels.velocity_to_score(
            guarded(velocity), x.to(DEVICE), t if isinstance(t, float) else guarded(t), convention="velocity",
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(score.cpu(), velocity * 4)


def judge_velocity_penalty(
    displacement: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    backend: str,
    layout: str = "contiguous",
    path: str = "linear",
    convention: str = "exact",
    **settings: Any,
) -> None:
    def made(velocity: Tensor, x: Tensor) -> Tensor:
        time = t.to(velocity) if isinstance(t, Tensor) else t
        return fdkernels_ref.velocity_to_score(velocity, x, time, path=path, convention=convention)

    def reference(displacement: Tensor, dtype: torch.dtype) -> Tensor:
        return fdkernels_ref.fisher_penalty(displacement, made(velocity.to(dtype), x.to(dtype)), **settings)

    def without_cancellation(displacement: Tensor) -> Tensor:
        """The terms that are rounded: those of the sums, all with the same sign."""
        v, zero = velocity.double(), torch.zeros_like(x, dtype=torch.float64)
        score = made(v, zero).abs() + made(zero, x.double()).abs()
        return fdkernels_ref.fisher_penalty(displacement, score, **settings)

    upstream = draw(displacement.shape[:-1], torch.float32, seed=9)
    given_t = guarded(t) if isinstance(t, Tensor) else t
    points = strided(velocity, layout), strided(x, layout)
    ours = functools.partial(
        fdkernels.velocity_fisher_penalty, velocity=points[0], x=points[1], t=given_t,
        path=path, convention=convention, backend=backend, **settings,
    )  # fmt: skip
    out = with_gradients(ours, (strided(displacement, layout),), upstream.to(DEVICE))
    truth = with_gradients(lambda δ: reference(δ, torch.float64), (displacement.double(),), upstream.double())
    plain = with_gradients(lambda δ: reference(δ, displacement.dtype), (displacement,), upstream)
    sizes = with_gradients(without_cancellation, (displacement.double().abs(),), upstream.double().abs())
    for name, *tensors, size in zip(("penalty", "gradient to displacement"), out, truth, plain, sizes):
        assert_close(name, *tensors, backend, size)


@cases
@kernels
def test_velocity_penalty_and_gradient(
    lead: tuple[int, ...], num_samples: int, d: int, dtype: torch.dtype, backend: str
) -> None:
    displacement = draw((*lead, d), dtype, 1)
    velocity, x = (draw((*lead, num_samples, d), dtype, seed) for seed in (3, 4))
    judge_velocity_penalty(displacement, velocity, x, 0.75, backend)
    times = (0.125 + 0.75 * draw((*lead, num_samples, 1), torch.float32).sigmoid()).to(dtype)
    judge_velocity_penalty(displacement, velocity, x, times, backend, normalize="none")
    judge_velocity_penalty(displacement, velocity, x, times.flatten()[:1], backend, convention="velocity")


@backends
@pytest.mark.parametrize("tensor_time", [False, True])
def test_velocity_penalty_gradients_to_everything(backend: str, tensor_time: bool) -> None:
    """If velocity, x or t require a gradient, two operators run one after the other, with the same result."""
    inputs = [draw((5, 6), torch.float32, 1), *(draw((5, 3, 6), torch.float32, seed) for seed in (3, 4))]
    t: list[Tensor | float] = [torch.full((5, 1, 1), 0.625) if tensor_time else 0.625]
    if tensor_time:
        inputs, t = [*inputs, t[0]], []  # type: ignore[list-item]
    out = with_gradients(
        lambda *args: fdkernels.velocity_fisher_penalty(*args, *t, backend=backend),
        tuple(guarded(tensor) for tensor in inputs),
    )
    truth = with_gradients(
        lambda δ, v, x, *time: fdkernels_ref.fisher_penalty(δ, fdkernels_ref.velocity_to_score(v, x, *time, *t)),
        tuple(tensor.double() for tensor in inputs),
    )
    for ours, right in zip(out, truth):
        assert (ours.cpu() - right).norm() <= 1e-5 * right.norm()


@backends
def test_bounded_normaliser_has_no_gradient(backend: str) -> None:
    displacement, score = draw((4, 6), torch.float32, 1), draw((4, 3, 6), torch.float32, 2, scale=1e-4)
    judge_penalty(displacement, score, backend, damping=0.0)


@backends
def test_no_scores_and_no_damping_give_zero(backend: str) -> None:
    out = with_gradients(
        functools.partial(fdkernels.fisher_penalty, damping=0.0, backend=backend),
        (guarded(torch.ones(3, 6)), guarded(torch.zeros(3, 2, 6))),
    )
    assert all((part == 0).all() for part in out)


@backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("num_samples", "d"), [(4, 6), (4, 8), (3, 17), (2, 1031)])
def test_a_bad_row_stays_alone(backend: str, value: float, num_samples: int, d: int) -> None:
    displacement, score = draw((9, d), torch.float32, 1), draw((9, num_samples, d), torch.float32, 2)
    good = [row for row in range(9) if row != 4]
    penalty = functools.partial(fdkernels.fisher_penalty, backend=backend)
    clean = with_gradients(penalty, (guarded(displacement), guarded(score)))
    score[4, -1, -1] = value
    out = with_gradients(penalty, (guarded(displacement), guarded(score)))
    for before, after in zip(clean, out):
        torch.testing.assert_close(after[good], before[good], rtol=0, atol=0)
    assert not out[0][4].isfinite()


@backends
def test_times_outside_the_unit_interval_give_nan_in_their_row(backend: str) -> None:
    displacement, velocity, x = draw((4, 6), torch.float32), *(draw((4, 2, 6), torch.float32, s) for s in (1, 2))
    t = torch.tensor([0.5, -0.1, 1.5, torch.nan]).view(4, 1, 1)
    given_tensors = [guarded(tensor) for tensor in (displacement, velocity, x, t)]
    score = fdkernels.velocity_to_score(*given_tensors[1:], backend=backend)
    penalty = fdkernels.velocity_fisher_penalty(*given_tensors, backend=backend)
    assert score.isnan().flatten(1).all(1).tolist() == penalty.isnan().tolist() == [False, True, True, True]


@backends
def test_an_empty_batch(backend: str) -> None:
    out = with_gradients(
        functools.partial(fdkernels.fisher_penalty, backend=backend),
        (torch.empty(0, 6, device=DEVICE), torch.empty(0, 4, 6, device=DEVICE)),
    )
    assert [tuple(part.shape) for part in out] == [(0,), (0, 6), (0, 4, 6)]
    x = torch.empty(0, 4, 6, device=DEVICE)
    assert fdkernels.velocity_to_score(x, x, 0.5, backend=backend).shape == (0, 4, 6)
    assert fdkernels.velocity_fisher_penalty(torch.empty(0, 6, device=DEVICE), x, x, 0.5, backend=backend).shape == (0,)


layouts = st.sampled_from(["contiguous", "transposed", "sliced"])


@given(
    lead=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    num_samples=st.one_of(st.integers(1, 20), st.integers(21, 200)),
    d=st.integers(1, 40),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=layouts,
    backend=st.sampled_from(BACKENDS),
    damping=st.sampled_from([0.0, 1e-3, 2.0]),
    normalize=st.sampled_from(["trace", "none"]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_penalty_on_anything(
    lead: tuple[int, ...], num_samples: int, d: int, dtypes: tuple[torch.dtype, torch.dtype], layout: str,
    backend: str, damping: float, normalize: str, scale: float, seed: int,
) -> None:  # fmt: skip
    displacement = draw((*lead, d), dtypes[0], seed)
    score = draw((*lead, num_samples, d), dtypes[1], seed + 1, scale)
    judge_penalty(displacement, score, backend, layout, damping=damping, normalize=normalize)


@given(
    lead=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    num_samples=st.integers(1, 9),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    backend=st.sampled_from(BACKENDS),
    path=st.sampled_from(["linear", "linear_reversed", "vp", "cosine"]),
    t=st.sampled_from([0.125, 0.5, 0.875]),
    broadcast=st.sampled_from([None, "scalar", "states", "samples", "all"]),
    seed=st.integers(0, 2**16),
)
def test_velocity_penalty_on_anything(
    lead: tuple[int, ...], num_samples: int, d: int, dtype: torch.dtype, layout: str, backend: str, path: str,
    t: float, broadcast: str | None, seed: int,
) -> None:  # fmt: skip
    displacement = draw((*lead, d), dtype, seed)
    velocity, x = (draw((*lead, num_samples, d), dtype, seed + i) for i in (1, 2))
    rows = {"scalar": (), "states": (*lead, 1, 1), "samples": (num_samples, 1), "all": (*lead, num_samples, 1)}
    time = t if broadcast is None else t * (0.9 + 0.1 * draw(rows[broadcast], torch.float32, seed).sigmoid()).to(dtype)
    judge_velocity_penalty(displacement, velocity, x, time, backend, layout, path=path)
    judge_score(velocity, x, time, backend, layout, path=path)
