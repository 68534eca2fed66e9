"""The penalty and the score on the PyTorch path, against the reference in float64 and against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fdkernels
import fdkernels_ref
from tests.judge import assert_close, with_gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_judged(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Values and all gradients of ``ours`` in ``dtype`` against the reference in float64, from the same inputs."""
    rounded = tuple(x.to(dtype) for x in inputs)
    truth = with_gradients(reference, tuple(x.double() for x in rounded))
    plain, out = with_gradients(reference, rounded), with_gradients(ours, rounded)
    names = ["value", *(f"gradient of argument {i}" for i in range(len(inputs)))]
    for name, *tensors in zip(names, out, truth, plain):
        # with d = 1 the normalised penalty does not depend on the scores, so their gradient is only rounding
        assert_close(name, *tensors, "torch", size=truth[0])


SHAPES = [((1,), 1, 1), ((5,), 4, 6), ((7,), 3, 17), ((2, 3), 1, 8), ((), 5, 2), ((33,), 9, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "k", "d"), SHAPES)
@pytest.mark.parametrize("normalize", ["trace", "none"])
def test_fisher_penalty(lead: tuple[int, ...], k: int, d: int, normalize: str, dtype: torch.dtype) -> None:
    torch.manual_seed(k * d)
    displacement, score = torch.randn(*lead, d), 3 * torch.randn(*lead, k, d)
    options = {"damping": 1e-2, "normalize": normalize}
    assert_judged(
        lambda x, s: fdkernels.fisher_penalty(x, s, **options),
        lambda x, s: fdkernels_ref.fisher_penalty(x, s, **options),
        [displacement, score],
        dtype,
    )


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 9),
    d=st.integers(1, 9),
    damping=st.sampled_from([0.0, 1e-3, 2.0]),
    eps=st.sampled_from([1e-6, 10.0]),
    transposed=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_fisher_penalty_anywhere(
    lead: list[int], k: int, d: int, damping: float, eps: float, transposed: bool, reduction: str
) -> None:
    displacement, score = torch.randn(*lead, d, dtype=torch.float64), torch.randn(*lead, k, d, dtype=torch.float64)
    if transposed:
        score = score.mT.contiguous().mT
        displacement = displacement.repeat_interleave(2, -1)[..., ::2]
    options = {"damping": damping, "eps": eps, "reduction": reduction}
    ours = fdkernels.fisher_penalty(displacement, score, **options)
    theirs = fdkernels_ref.fisher_penalty(displacement, score, **options)
    without_cancellation = fdkernels_ref.fisher_penalty(displacement.abs(), score.abs(), **options).nan_to_num(1)
    torch.testing.assert_close(
        ours / without_cancellation, theirs / without_cancellation, rtol=0, atol=1e-13, equal_nan=True
    )


def test_fisher_penalty_gradient_stops_at_the_floor() -> None:
    score = torch.full((1, 2, 3), 1e-5, dtype=torch.float64, requires_grad=True)
    displacement = torch.ones(1, 3, dtype=torch.float64)
    fdkernels.fisher_penalty(displacement, score, damping=0.0, eps=1.0).sum().backward()
    # on the ε branch the penalty is (1/K) Σ (s·δ)² / (ε d), whose derivative in s is 2 (s·δ) δ / (K ε d)
    torch.testing.assert_close(score.grad, torch.full_like(score, 2 * 3e-5 / (2 * 1.0 * 3)))


def test_fisher_penalty_passes_gradcheck() -> None:
    inputs = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(fdkernels.fisher_penalty, [x.requires_grad_() for x in inputs])


def test_a_bad_row_stays_alone() -> None:
    displacement, score = torch.randn(4, 3), torch.randn(4, 2, 3)
    clean = fdkernels.fisher_penalty(displacement, score)
    score[1, 0, 2], score[2, 1, 0] = torch.nan, torch.inf
    penalty = fdkernels.fisher_penalty(displacement, score)
    assert penalty[[1, 2]].isnan().all()
    assert torch.equal(penalty[[0, 3]], clean[[0, 3]])


def test_isotropic_scores_give_the_mean_square() -> None:
    displacement = torch.randn(5, 3, dtype=torch.float64)
    score = 2 * torch.eye(3, dtype=torch.float64).expand(5, 3, 3)
    penalty = fdkernels.fisher_penalty(displacement, score)
    torch.testing.assert_close(penalty, displacement.square().mean(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["linear", "linear_reversed", "vp", "cosine"])
@pytest.mark.parametrize("tensor_time", [False, True])
def test_velocity_to_score(path: str, tensor_time: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    velocity, x = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    t = torch.linspace(0.25, 0.75, 24).view(6, 4, 1) if tensor_time else 0.625
    assert_judged(
        lambda v, x: fdkernels.velocity_to_score(v, x, t, path=path),
        lambda v, x: fdkernels_ref.velocity_to_score(v, x, t if not tensor_time else t.to(v.dtype), path=path),
        [velocity, x],
        dtype,
    )


def test_velocity_convention() -> None:
    velocity, x = torch.randn(3, 2), torch.randn(3, 2)
    score = fdkernels.velocity_to_score(velocity, x, 0.75, convention="velocity")
    torch.testing.assert_close(score, 4 * velocity)
    with pytest.raises(ValueError, match="path='linear' only"):
        fdkernels.velocity_to_score(velocity, x, 0.75, convention="velocity", path="vp")


def test_a_path_of_ones_own() -> None:
    linear = fdkernels.AffinePath(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t))
    velocity, x = torch.randn(2, 3, 2, dtype=torch.float64)
    ours = fdkernels.velocity_to_score(velocity, x, 0.3, path=linear)
    torch.testing.assert_close(ours, fdkernels.velocity_to_score(velocity, x, 0.3))


def test_a_time_outside_the_path_gives_nan_not_a_number() -> None:
    t = torch.tensor([[-0.1], [0.5], [1.5]])
    score = fdkernels.velocity_to_score(torch.ones(3, 2), torch.ones(3, 2), t)
    assert score[[0, 2]].isnan().all()
    assert score[1].isfinite().all()


def test_spectrum_is_not_rounded_by_autocast() -> None:
    score = torch.randn(4, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fdkernels.fisher_spectrum(score)
    torch.testing.assert_close(rounded, fdkernels.fisher_spectrum(score))


def test_spectrum() -> None:
    score = torch.randn(4, 5, 3, dtype=torch.float64)
    fisher = fdkernels_ref.fisher_matrix(score, damping=0.1)
    torch.testing.assert_close(fdkernels.fisher_spectrum(score, damping=0.1), torch.linalg.eigvalsh(fisher).flip(-1))


# -- bad input -------------------------------------------------------------------------------------------------------

D, S = torch.randn(4, 6), torch.randn(4, 3, 6)
BAD = {
    "no tensor": (lambda: fdkernels.fisher_penalty([1.0], S), TypeError, "displacement must be a torch.Tensor"),
    "integers": (lambda: fdkernels.fisher_penalty(D.long(), S), TypeError, "displacement must be float32.*int64"),
    "other d": (lambda: fdkernels.fisher_penalty(D, S[..., :5]), ValueError, r"d=6 .*got \(4, 3, 5\)"),
    "other rows": (lambda: fdkernels.fisher_penalty(D, S[:2]), ValueError, r"score must be \(\.\.\., K, d\)"),
    "no samples": (lambda: fdkernels.fisher_penalty(D, S[:, :0]), ValueError, "K of at least 1"),
    "no dimension": (lambda: fdkernels.fisher_penalty(D[:, :0], S[..., :0]), ValueError, "d of at least 1"),
    "devices": (lambda: fdkernels.fisher_penalty(D, S.to("meta")), ValueError, "one device"),
    "damping": (lambda: fdkernels.fisher_penalty(D, S, damping=-1e-3), ValueError, "damping must be"),
    "damping nan": (lambda: fdkernels.fisher_penalty(D, S, damping=float("nan")), ValueError, "damping must be"),
    "eps": (lambda: fdkernels.fisher_penalty(D, S, eps=0.0), ValueError, "eps must be finite and > 0"),
    "normalize": (lambda: fdkernels.fisher_penalty(D, S, normalize="det"), ValueError, "'trace', 'none', got 'det'"),
    "reduction": (lambda: fdkernels.fisher_penalty(D, S, reduction="max"), ValueError, "reduction must be one of"),
    "backend": (lambda: fdkernels.fisher_penalty(D, S, backend="cuda"), ValueError, "backend must be one of"),
    "triton": (lambda: fdkernels.fisher_penalty(D, S, backend="triton"), RuntimeError, "backend='triton'"),
    "t = 1": (lambda: fdkernels.velocity_to_score(D, D, 1.0), ValueError, r"some noise .* got t=1\.0"),
    "t = 0 reversed": (lambda: fdkernels.velocity_to_score(D, D, 0, path="linear_reversed"), ValueError, "some noise"),
    "t above": (lambda: fdkernels.velocity_to_score(D, D, 1.2), ValueError, r"t must lie in \[0, 1\], got 1\.2"),
    "t text": (lambda: fdkernels.velocity_to_score(D, D, "0.5"), TypeError, "t must be a number"),
    "t shape": (lambda: fdkernels.velocity_to_score(D, D, torch.rand(3, 1)), ValueError, "t must broadcast"),
    "x shape": (lambda: fdkernels.velocity_to_score(D, D[:2], 0.5), ValueError, "x must be velocity's shape"),
    "path": (lambda: fdkernels.velocity_to_score(D, D, 0.5, path="ve"), ValueError, "path must be an AffinePath or"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_empty_batches(lead: tuple[int, ...]) -> None:
    displacement = torch.randn(*lead, 6, requires_grad=True)
    penalty = fdkernels.fisher_penalty(displacement, torch.randn(*lead, 3, 6))
    assert penalty.shape == lead
    penalty.sum().backward()
    assert displacement.grad is not None


def test_a_tensor_of_a_finished_transform() -> None:
    """A tensor that escaped from ``torch.func.grad`` is a wrapper without a transform."""
    kept: list[Tensor] = []
    displacement, score = torch.randn(3, 6), torch.randn(3, 4, 6, requires_grad=True)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(displacement)
    penalty, plain = (fdkernels.fisher_penalty(x, score) for x in (kept[0], displacement))
    torch.testing.assert_close(penalty, plain)
    gradients = [torch.autograd.grad(p.sum(), score)[0] for p in (penalty, plain)]
    torch.testing.assert_close(*gradients)
