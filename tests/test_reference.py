"""fdkernels_ref against closed forms: for Gaussians and their mixtures every step of the chain is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fdkernels_ref as ref
from tests.closed_forms import SCHEDULES, Gaussian, Mixture, anisotropic_gaussian, two_modes

F64 = torch.float64
EXACT = dict(rtol=1e-9, atol=1e-10)  # float64's rounding, with room for the division by σ


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_exact(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, **EXACT, msg=lambda text: f"{what}: {text}")


def assert_mean(values: Tensor, expected: Tensor | float, what: str) -> None:
    """Check that the mean of `values` (n, ...) lies within 4.5 standard errors of `expected`."""
    error = values.std(0) / math.sqrt(len(values))
    off = (values.mean(0) - expected).abs() / error
    assert off.max() < 4.5, f"{what}: {values.mean(0)} ± {error}, expected {expected}: {off.max():.1f} standard errors"


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    x, y = torch.tensor(xs, dtype=F64).log(), torch.tensor(ys, dtype=F64).log()
    return float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum())


def on_path(data: Tensor, t: float, seed: int) -> Tensor:
    """x_t on the linear path."""
    return (1 - t) * normal(*data.shape, seed=seed) + t * data


# Paths and score -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_paths_are_the_schedules_with_their_derivatives(name):
    path, schedule = ref.PATHS[name], SCHEDULES[name]
    t = torch.linspace(0.02, 0.98, 25, dtype=F64).requires_grad_()
    for what in ("alpha", "sigma"):
        value = getattr(schedule, what)(t)
        (rate,) = torch.autograd.grad(value.sum(), t)
        assert_exact(getattr(path, what)(t), value, f"{name}.{what}")
        assert_exact(getattr(path, f"d_{what}")(t), rate, f"{name}.d_{what}")
        assert_exact(getattr(schedule, f"d_{what}")(t), rate, f"d_{what} of the closed form of {name}")
    ends = torch.tensor([schedule.data_time, 1 - schedule.data_time], dtype=F64)
    noise_left = math.exp(-(0.1 + 20) / 4) if name == "vp" else 0.0  # VP ends at almost pure noise
    assert_exact(path.alpha(ends), torch.tensor([1.0, noise_left], dtype=F64), f"{name}: α at data and at noise")
    noise = math.sqrt(1 - noise_left**2)
    assert_exact(path.sigma(ends), torch.tensor([0.0, noise], dtype=F64), f"{name}: σ at data and at noise")


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("make", [anisotropic_gaussian, two_modes])
def test_exact_score_is_the_gradient_of_log_p(make, path):
    density = make(3, path=path)
    x = normal(40, 3, seed=1).requires_grad_()
    t = torch.linspace(0.03, 0.97, 40, dtype=F64)[:, None]
    score = ref.velocity_to_score(density.velocity(x, t), x, t, path=path)
    (gradient,) = torch.autograd.grad(density.log_prob_t(x, t).sum(), x)
    assert_exact(density.score(x, t), gradient, "the closed form against its own log-density")
    assert_exact(score, gradient, f"score from velocity on {path}")


def test_score_takes_a_float_time_and_a_path_of_ones_own():
    gaussian = anisotropic_gaussian(2)
    x, t = normal(7, 2), 0.4
    own = SimpleNamespace(
        alpha=lambda t: t, sigma=lambda t: 1 - t, d_alpha=lambda t: 0 * t + 1, d_sigma=lambda t: 0 * t - 1
    )
    for path in ("linear", own):
        assert_exact(ref.velocity_to_score(gaussian.velocity(x, t), x, t, path=path), gaussian.score(x, t), f"{path}")


@pytest.mark.parametrize(
    ("convention", "numerator"), [("exact", lambda v, x, t: t * v - x), ("velocity", lambda v, x, t: v)]
)
@pytest.mark.parametrize("t", [0.5, 0.999, 1.0])
def test_min_sigma_bounds_the_denominator_only(t, convention, numerator):
    v, x = normal(5, 3, seed=1), normal(5, 3, seed=2)
    score = ref.velocity_to_score(v, x, t, convention=convention, min_sigma=0.01)
    assert_exact(score, numerator(v, x, t) / max(1 - t, 0.01), f"{convention} at t = {t}")


def test_velocity_convention_is_not_a_score():
    gaussian = Gaussian(torch.zeros(2, dtype=F64), torch.diag(torch.tensor([0.2, 0.5], dtype=F64)))
    x, t = normal(50, 2), 0.95
    v = gaussian.velocity(x, t)
    field = ref.velocity_to_score(v, x, t, convention="velocity")
    assert_exact(field, v / (1 - t), "the published formula")
    # A density's score pulls towards a centre; this field pushes away from it everywhere.
    assert ((gaussian.score(x, t) * x).sum(-1) < 0).all()
    assert ((field * x).sum(-1) > 0).all(), "v/(1−t) points inward somewhere, as a score would"


# Flow ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_order_of_convergence(method, order, start, end):
    # Not the linear path: Σ_t is quadratic in t there, so midpoint's h³ term vanishes on every Gaussian (order 3).
    gaussian = anisotropic_gaussian(3, path="cosine")
    x0 = normal(20, 3)
    exact = gaussian.transport(x0, start, end)
    steps, errors = [64, 128, 256], []
    for n in steps:
        grid = torch.linspace(start, end, n + 1, dtype=F64)
        out = ref.integrate_flow(gaussian.velocity, x0, method=method, time_grid=grid, clip=None)
        errors.append(float((out - exact).norm() / exact.norm()))
    measured = -slope(steps, errors)
    assert abs(measured - order) < 0.15, f"{method}: order {measured:.3f}, expected {order}; errors {errors}"


def test_euler_by_hand():
    """The Gaussian's Euler map is affine, a product of S known matrices. This also checks the default grid, i/S."""
    gaussian = anisotropic_gaussian(3)
    x0, steps, eye = normal(6, 3), 10, torch.eye(3, dtype=F64)
    expected = x0
    for i in range(steps):
        t = i / steps
        gain = (t * gaussian.covariance - (1 - t) * eye) @ torch.linalg.inv(gaussian.covariance_t(t))
        expected = expected + (gaussian.mean + (expected - t * gaussian.mean) @ gain.mT) / steps
    out = ref.integrate_flow(gaussian.velocity, x0, num_steps=steps, clip=None)
    assert_exact(out, expected, "ten Euler steps")


@pytest.mark.parametrize(("path", "grid"), [("linear", None), ("linear_reversed", torch.linspace(1, 0, 41))])
def test_gaussian_samples(path, grid):
    """Samples lie where the exact flow carries their noise, and have the data's mean and covariance."""
    gaussian = anisotropic_gaussian(3, path=path)
    x0 = normal(20_000, 3)
    out = ref.integrate_flow(gaussian.velocity, x0, num_steps=40, method="rk4", time_grid=grid, clip=None)
    start, end = 1 - SCHEDULES[path].data_time, SCHEDULES[path].data_time
    error = (out - gaussian.transport(x0, start, end)).abs().max()
    assert error < 1e-6, f"{path}: {error:.1e} from the exact transport"
    assert_mean(out, gaussian.mean, f"{path}: mean")
    centred = out - gaussian.mean
    assert_mean(centred[:, :, None] * centred[:, None, :], gaussian.covariance, f"{path}: covariance")


def test_mixture_samples():
    """Mean, covariance and mode weights of 20,000 samples; the flow's error is below a tenth of a standard error."""
    mixture = two_modes(2)
    x0 = normal(20_000, 2)
    out = ref.integrate_flow(mixture.velocity, x0, num_steps=40, method="rk4", clip=None)
    assert_mean(out, mixture.mean, "mean")
    centred = out - mixture.mean
    assert_mean(centred[:, :, None] * centred[:, None, :], mixture.covariance_t(1.0), "covariance")
    weights = torch.tensor(mixture.weights, dtype=F64)
    assert_mean(mixture.responsibilities(out, 1.0), weights, "mode weights")


def test_mixture_flow_in_one_dimension_preserves_quantiles():
    """Flow lines in one dimension cannot cross, so each quantile of N(0, 1) goes to the same quantile of the data."""
    mixture = two_modes(1)
    x0 = torch.linspace(-3, 3, 61, dtype=F64)[:, None]
    out = ref.integrate_flow(mixture.velocity, x0, num_steps=100, method="rk4", clip=None)
    cdf = sum(
        w * torch.special.ndtr((out - mode.mean) / mode.covariance.sqrt())
        for w, mode in zip(mixture.weights, mixture.modes)
    )
    error = (cdf - torch.special.ndtr(x0)).abs().max()
    assert error < 2e-7, f"quantiles moved by up to {error:.1e}"


def test_flow_clips_the_end_and_only_the_end():
    """x' = 3·(1 − 2t) runs from 0 past 1 and back, so clipping on the way would change the end."""
    x0 = torch.tensor([[-0.5], [0.0], [0.9]], dtype=F64)
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    out = ref.integrate_flow(lambda x, t, cond: 3 * (1 - 2 * t), x0, time_grid=grid, return_path=True)
    expected = x0 + torch.tensor([0.0, 0.75, 1.125, 1.125, 0.75], dtype=F64)[:, None, None]
    assert expected[1:4].max() > 1, "the case does not leave the bounds"
    expected[-1] = expected[-1].clamp(max=1)
    assert_exact(out, expected, "nodes of the path")
    last = ref.integrate_flow(lambda x, t, cond: 3 * (1 - 2 * t), x0, time_grid=grid, clip=(-0.1, 0.3))
    assert_exact(last, torch.tensor([[0.25], [0.3], [0.3]], dtype=F64), "bounds of one's own")


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)])
def test_flow_hands_time_and_condition_to_the_velocity(batch):
    x0, cond = normal(*batch, 3, seed=1).float(), normal(*batch, 2, seed=2).float()
    times = []

    def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert c is cond
        assert (t.shape, t.dtype) == ((*batch, 1), torch.float32)
        times.append(t)
        return c[..., :1].expand_as(x)

    out = ref.integrate_flow(velocity, x0, cond, num_steps=4, clip=None)
    torch.testing.assert_close(out, x0 + cond[..., :1])
    for t, expected in zip(times, [0, 0.25, 0.5, 0.75]):
        assert (t == expected).all(), f"velocity called at {t}, expected {expected}"


def test_flow_gradient_runs_through_every_step():
    """Euler on x' = θ·x gives x0·(1 + θ/S)^S."""
    theta = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x0 = normal(4, 2).requires_grad_()
    out = ref.integrate_flow(lambda x, t, cond: theta * x, x0, num_steps=5, clip=None)
    to_x0, to_theta = torch.autograd.grad(out.sum(), (x0, theta))
    growth = 1 + 0.7 / 5
    assert_exact(to_x0, torch.full_like(x0, growth**5), "∂/∂x0")
    assert_exact(to_theta, x0.detach().sum() * growth**4, "∂/∂θ")


# Fisher --------------------------------------------------------------------------------------------------------------


def scores_with(matrix: Tensor) -> Tensor:
    """d scores whose mean outer product is exactly the given matrix (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values * len(values)).sqrt()).mT


def test_known_matrix():
    """Matrix, normalised matrix, penalty and spectrum of an F that is known exactly."""
    matrix, eye = anisotropic_gaussian(4, seed=3).covariance, torch.eye(4, dtype=F64)
    score, delta = scores_with(matrix), normal(4, seed=1)
    damped = matrix + 0.01 * eye
    trace = damped.trace()
    assert_exact(ref.fisher_matrix(score, damping=0.01), damped, "F")
    assert_exact(ref.normalize_fisher(damped), damped * 4 / trace, "F̂")
    assert_exact(ref.fisher_penalty(delta, score, damping=0.01), delta @ damped @ delta / trace, "δᵀF̂δ/d")
    plain = ref.fisher_penalty(delta, score, damping=0.01, normalize="none")
    assert_exact(plain, delta @ damped @ delta / 4, "δᵀFδ/d")
    expected = torch.linspace(0.6, 0.2, 4, dtype=F64) ** 2 + 0.01
    assert_exact(ref.fisher_spectrum(score, damping=0.01), expected, "eigenvalues, largest first")


def test_isotropic_fisher_gives_the_mean_square():
    delta, score = normal(6, 5, seed=1), scores_with(3.7 * torch.eye(5, dtype=F64))
    assert_exact(ref.fisher_penalty(delta, score.expand(6, 5, 5)), (delta**2).mean(-1), "F ∝ I")


def test_one_sample():
    """K = 1: F has rank one, and only the damping resists a displacement across the score."""
    score = torch.tensor([[3.0, 4.0]], dtype=F64)
    along, across = score[0] / 5, torch.tensor([-0.8, 0.6], dtype=F64)
    penalty = ref.fisher_penalty(torch.stack([along, across]), score.expand(2, 1, 2), damping=0.5, normalize="none")
    assert_exact(penalty, torch.tensor([25.5, 0.5], dtype=F64) / 2, "along and across the score")
    assert_exact(ref.fisher_spectrum(score, damping=0.5), torch.tensor([25.5, 0.5], dtype=F64), "spectrum")


def test_eps_takes_over_where_the_trace_is_small():
    delta = torch.ones(2, 2, dtype=F64)
    score = torch.tensor([[[0.1, 0.0]], [[10.0, 0.0]]], dtype=F64)  # tr F/d: 0.005 and 50
    penalty = ref.fisher_penalty(delta, score, damping=0.0, eps=0.1)
    assert_exact(penalty, torch.tensor([0.01 / 0.1 / 2, 1.0], dtype=F64), "below and above ε")
    nothing = ref.fisher_penalty(delta, 0 * score, damping=0.0)
    assert (nothing == 0).all(), f"zero scores without damping: {nothing}"


def test_many_scores_in_float16():
    """The mean of s·sᵀ over 512 scores fits in float16, but their sum does not."""
    score = torch.full((512, 2), 20.0, dtype=torch.float16)
    assert (ref.fisher_matrix(score, damping=0.0) == 400).all()


def test_reductions():
    delta, score = normal(2, 3, 4, seed=1), normal(2, 3, 5, 4, seed=2)
    rows = ref.fisher_penalty(delta, score)
    assert rows.shape == (2, 3)
    assert_exact(ref.fisher_penalty(delta, score, reduction="mean"), rows.sum() / 6, "mean")
    assert_exact(ref.fisher_penalty(delta, score, reduction="sum"), rows.sum(), "sum")
    one = ref.fisher_penalty(delta[1, 2], score[1, 2])
    assert_exact(rows[1, 2], one, "a row of the batch on its own")


@pytest.mark.parametrize("normalize", ["trace", "none"])
@pytest.mark.parametrize("eps", [1e-6, 1e3])
def test_gradients_are_those_of_the_formula(normalize, eps):
    """Both gradients in closed form, from N / M with N = (1/K)Σ(s·δ)² + λ‖δ‖² and M = max((1/K)Σ‖s‖² + λd, εd)."""
    d, k, damping = 3, 4, 0.1
    delta, score = normal(5, d, seed=1).requires_grad_(), normal(5, k, d, seed=2).requires_grad_()
    penalty = ref.fisher_penalty(delta, score, damping=damping, normalize=normalize, eps=eps)
    to_delta, to_score = torch.autograd.grad(penalty.sum(), (delta, score))
    along = (score * delta[:, None]).sum(-1, keepdim=True)  # s·δ
    above = (along**2).mean(-2) + damping * (delta**2).sum(-1, keepdim=True)
    trace = (score**2).sum((-2, -1))[:, None] / k + damping * d
    below = trace.clamp(min=eps * d) if normalize == "trace" else torch.full_like(trace, float(d))
    assert_exact(penalty, (above / below)[:, 0], "value")
    assert_exact(to_delta, 2 * ((along * score).mean(-2) + damping * delta) / below, "∂/∂δ")
    trace_moves = (trace > eps * d) & (normalize == "trace")
    expected = (
        2 / k * (along * delta[:, None] / below[:, None] - trace_moves[:, None] * (above / below**2)[:, None] * score)
    )
    assert_exact(to_score, expected, "∂/∂s")


def test_expected_penalty_of_a_gaussian():
    """E[δᵀFδ] = δᵀΣ_t⁻¹δ; normalised, it is divided by tr Σ_t⁻¹."""
    gaussian, t, n = anisotropic_gaussian(3), 0.8, 40_000
    x = on_path(gaussian.sample(n, torch.Generator().manual_seed(5)), t, seed=6)
    score = ref.velocity_to_score(gaussian.velocity(x, t), x, t)
    precision = torch.linalg.inv(gaussian.covariance_t(t))
    for delta in (*torch.eye(3, dtype=F64), normal(3, seed=7)):
        expected, terms = delta @ precision @ delta, (score @ delta) ** 2
        error = terms.std() / math.sqrt(n)
        plain = 3 * ref.fisher_penalty(delta, score, damping=0.0, normalize="none")
        assert abs(plain - expected) < 4.5 * error, f"δᵀFδ = {plain} ± {error}, expected {expected}"
        ratio = expected / precision.trace()
        error = (terms - ratio * (score**2).sum(-1)).std() / precision.trace() / math.sqrt(n)
        normalised = ref.fisher_penalty(delta, score, damping=0.0)
        assert abs(normalised - ratio) < 4.5 * error, f"δᵀF̂δ/d = {normalised} ± {error}, expected {ratio}"


def test_penalty_is_the_kl_divergence_to_third_order():
    """|KL(p_t(·−δ) ‖ p_t) − ½·δᵀFδ| = O(‖δ‖³) for a mixture in the plane, both sides by the trapezoid rule."""
    mixture, t = two_modes(2), 0.8
    axis = torch.linspace(-4.5, 4.5, 301, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    log_p = mixture.log_prob_t(x, t)
    assert abs(float(log_p.exp().sum()) * cell - 1) < 1e-9, "the grid does not hold the density"
    # Weighting the scores by √(n·p·cell) makes their plain mean of outer products ∫ p·s·sᵀ.
    score = ref.velocity_to_score(mixture.velocity(x, t), x, t) * (len(x) * cell * log_p.exp())[:, None].sqrt()
    direction = torch.tensor([0.8, 0.6], dtype=F64)
    sizes, gaps = [0.16, 0.08, 0.04, 0.02, 0.01], []
    for size in sizes:
        delta = size * direction
        log_shifted = mixture.log_prob_t(x - delta, t)
        kl = float((log_shifted.exp() * (log_shifted - log_p)).sum()) * cell
        quadratic = float(ref.fisher_penalty(delta, score, damping=0.0, normalize="none")) * len(delta) / 2
        gaps.append(abs(kl - quadratic))
    measured = slope(sizes, gaps)
    assert measured > 2.9, f"order {measured:.2f}; gaps {gaps}"


# The whole chain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["exact", "velocity"])
@pytest.mark.parametrize("t", [0.6, torch.tensor([[[0.6]], [[0.3]]], dtype=F64)], ids=["float", "tensor"])
def test_chain_by_hand(t, convention):
    """With a constant velocity for each state, every step is a line of arithmetic; the clip is active."""
    batch, k, d = 2, 3, 4
    cond, delta = normal(batch, d, seed=1), normal(batch, d, seed=2)
    noise, bridge_noise = normal(batch, k, d, seed=3), normal(batch, k, d, seed=4)
    penalty, score = ref.flow_fisher_penalty(
        lambda x, t, c: c, cond, delta, num_samples=k, t=t, noise=noise, bridge_noise=bridge_noise, damping=0.2,
        convention=convention, return_score=True,
    )  # fmt: skip
    v = cond[:, None]
    end = noise + v
    assert (end.abs() > 1).any(), "the clip is not active"
    x_t = (1 - t) * bridge_noise + t * end.clamp(-1, 1)
    expected = (t * v - x_t if convention == "exact" else v.expand_as(x_t)) / (1 - t)
    assert_exact(score, expected, "score")
    along = (expected * delta[:, None]).sum(-1)
    above = (along**2).mean(-1) + 0.2 * (delta**2).sum(-1)
    assert_exact(penalty, above / ((expected**2).sum((-2, -1)) / k + 0.2 * d), "penalty")


@pytest.mark.parametrize(("normalize", "damping"), [("trace", 0.0), ("trace", 0.5), ("none", 0.5)])
def test_chain_on_a_gaussian(normalize, damping):
    """With many samples the penalty is (δᵀΣ_t⁻¹δ + λ‖δ‖²)/(tr Σ_t⁻¹ + λd) at t = 0.8; the state moves the mean."""
    gaussian, t, k = anisotropic_gaussian(3), 0.8, 20_000
    cond, delta = normal(2, 3, seed=1), normal(2, 3, seed=2)
    penalty, score = ref.flow_fisher_penalty(
        lambda x, t, c: c + gaussian.velocity(x - t * c, t), cond, delta, num_samples=k, t=t, method="rk4",
        num_steps=10, clip=None, damping=damping, normalize=normalize,
        generator=torch.Generator().manual_seed(8), return_score=True,
    )  # fmt: skip
    fisher = torch.linalg.inv(gaussian.covariance_t(t)) + damping * torch.eye(3, dtype=F64)
    divisor = fisher.trace() if normalize == "trace" else torch.tensor(3.0, dtype=F64)
    expected = ((delta @ fisher) * delta).sum(-1) / divisor
    terms = (score * delta[:, None]).sum(-1) ** 2
    if normalize == "trace":
        terms = terms - expected[:, None] * (score**2).sum(-1)
    error = terms.std(-1) / divisor / math.sqrt(k)
    assert ((penalty - expected).abs() < 4.5 * error).all(), f"{penalty} ± {error}, expected {expected}"


def test_chain_passes_its_options_on():
    """v = t on the nodes 0, 0.5, 2 moves by 0.75; at t = 1 the score is (1 − a)/min_sigma; ε divides."""
    delta, noise = normal(2, 3, seed=1), normal(2, 4, 3, seed=2)
    penalty, score = ref.flow_fisher_penalty(
        lambda x, t, c: t.expand_as(x), normal(2, 1), delta, noise=noise, bridge_noise=noise, t=1.0,
        time_grid=[0.0, 0.5, 2.0], clip=(-0.5, 0.5), min_sigma=0.1, damping=0.0, eps=1e6, reduction="sum",
        return_score=True,
    )  # fmt: skip
    expected = (1 - (noise + 0.75).clamp(-0.5, 0.5)) / 0.1
    assert_exact(score, expected, "score")
    along = (expected * delta[:, None]).sum(-1)
    assert_exact(penalty, (along**2).mean(-1).sum() / (3 * 1e6), "penalty")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chain_stays_in_the_dtype_of_its_input(dtype):
    cond, delta = normal(5, 2).to(dtype), normal(5, 3).to(dtype)
    penalty, score = ref.flow_fisher_penalty(lambda x, t, c: x * t, cond, delta, return_score=True)
    assert (penalty.dtype, score.dtype) == (dtype, dtype)
    assert penalty.isfinite().all(), f"{penalty}"


def test_chain_differentiates_the_displacement_only():
    network = torch.nn.Linear(3 + 2 + 1, 3, dtype=F64)
    leaves = [x.requires_grad_() for x in (normal(5, 2), normal(5, 4, 3, seed=1), normal(5, 4, 3, seed=2))]
    cond, noise, bridge_noise = leaves
    delta = normal(5, 3, seed=3).requires_grad_()
    penalty, score = ref.flow_fisher_penalty(
        lambda x, t, c: network(torch.cat([c, x, t], -1)), cond, delta, noise=noise, bridge_noise=bridge_noise,
        damping=0.1, return_score=True,
    )  # fmt: skip
    assert not score.requires_grad, "the score is part of the graph"
    penalty.sum().backward()
    for leaf in (*leaves, *network.parameters()):
        assert leaf.grad is None, f"a gradient reached an input of shape {tuple(leaf.shape)}"
    along = (score * delta[:, None]).sum(-1, keepdim=True)
    trace = (score**2).sum((-2, -1))[:, None] / 4 + 0.1 * 3
    assert_exact(delta.grad, 2 * ((along * score).mean(-2) + 0.1 * delta.detach()) / trace, "∂/∂δ = 2·F̂δ/d")


def test_chain_draws_from_the_generator():
    """The same seed gives the same penalty; the flow's noise is drawn first, the bridge's second."""
    velocity, cond, delta = anisotropic_gaussian(3).velocity, normal(5, 2), normal(5, 3, seed=1)

    def penalty(seed: int, **given: Tensor) -> Tensor:
        return ref.flow_fisher_penalty(
            velocity, cond, delta, num_samples=6, generator=torch.Generator().manual_seed(seed), **given
        )

    source = torch.Generator().manual_seed(3)
    noise, bridge_noise = (torch.randn(5, 6, 3, generator=source, dtype=F64) for _ in range(2))
    assert torch.equal(penalty(3), penalty(3)), "the same seed gave two penalties"
    assert torch.equal(penalty(3), penalty(4, noise=noise, bridge_noise=bridge_noise)), "given noise is not used"
    assert not torch.equal(penalty(3), penalty(4)), "the seed plays no part"


# Pull-back ------------------------------------------------------------------------------------------------------------


def sizes_by(matrix: Tensor, delta: Tensor) -> Tensor:
    """δᵀMδ/d."""
    return ((delta @ matrix) * delta).sum(-1) / delta.shape[-1]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_jacobian_squares_to_the_covariance(method, order):
    """J·Jᵀ → Σ from any noise, in the method's order."""
    gaussian = anisotropic_gaussian(3, path="cosine")  # not linear, see test_order_of_convergence
    steps, errors = [64, 128, 256], []
    for n in steps:
        _, jacobian = ref.flow_jacobian(gaussian.velocity, normal(4, 3), num_steps=n, method=method, clip=None)
        errors.append(float((jacobian @ jacobian.mT - gaussian.covariance).norm()))
    measured = -slope(steps, errors)
    assert abs(measured - order) < 0.15, f"{method}: order {measured:.3f}, expected {order}; errors {errors}"


@pytest.mark.parametrize("grid", [None, [0.1, 0.4, 0.9], [0.9, 0.5, 0.1]])
def test_jacobian_of_euler_is_a_product(grid):
    """Π (I + h·∂v/∂x) of the discrete steps, later steps on the left, each at the point that the path has there."""
    mixture, x = two_modes(3), normal(5, 3)
    times = [i / 10 for i in range(11)] if grid is None else grid
    expected = torch.eye(3, dtype=F64).expand(5, 3, 3)
    nodes = ref.integrate_flow(mixture.velocity, x, time_grid=times, clip=None, return_path=True)
    for start, t, end in zip(nodes, times, times[1:]):
        step = torch.stack([
            torch.autograd.functional.jacobian(lambda z, t=t: mixture.velocity(z, t), row) for row in start
        ])  # fmt: skip
        expected = (torch.eye(3, dtype=F64) + (end - t) * step) @ expected
    action, jacobian = ref.flow_jacobian(mixture.velocity, x, time_grid=grid)
    assert_exact(jacobian, expected, "product of the steps")
    assert_exact(action, nodes[-1].clamp(-1, 1), "action")
    assert not torch.allclose(jacobian, jacobian.mT), "the case cannot tell rows from columns"


def test_jacobian_by_hand():
    """The Gaussian's Euler map is affine, so that J is a product of known matrices, the same for all noise."""
    gaussian, steps, eye = anisotropic_gaussian(3), 10, torch.eye(3, dtype=F64)
    expected = eye
    for t in (i / steps for i in range(steps)):
        gain = (t * gaussian.covariance - (1 - t) * eye) @ torch.linalg.inv(gaussian.covariance_t(t))
        expected = (eye + gain / steps) @ expected
    _, jacobian = ref.flow_jacobian(gaussian.velocity, normal(2, 3, 3))
    assert_exact(jacobian, expected.expand(2, 3, 3, 3), "ten Euler steps")


def test_clip_leaves_the_jacobian():
    x0 = torch.tensor([[-0.9], [0.2]], dtype=F64)
    action, jacobian = ref.flow_jacobian(lambda x, t, c: x, x0, num_steps=1, clip=(-1.0, 0.3))
    assert_exact(action, torch.tensor([[-1.0], [0.3]], dtype=F64), "clipped")
    assert_exact(jacobian, torch.full((2, 1, 1), 2.0, dtype=F64), "before the clip")
    assert not action.requires_grad
    assert not jacobian.requires_grad


def test_pullback_is_the_length_of_the_noise():
    """K = 1 without damping: ‖J⁻¹δ‖²/d; with it, a direction that J does not reach has the variance λ."""
    delta, jacobian = normal(5, 3, seed=1), normal(5, 1, 3, 3, seed=2)
    noise = torch.linalg.solve(jacobian[:, 0], delta)
    penalty = ref.pullback_penalty(delta, jacobian, damping=0.0, normalize="none")
    assert_exact(penalty, noise.square().mean(-1), "‖J⁻¹δ‖²/d")
    flat = torch.diag(torch.tensor([2.0, 0.0], dtype=F64)).expand(2, 1, 2, 2)
    penalty = ref.pullback_penalty(torch.eye(2, dtype=F64), flat, damping=0.5, normalize="none")
    assert_exact(penalty, torch.tensor([1 / 4.5, 1 / 0.5], dtype=F64) / 2, "1/(σ² + λ)")


def test_pullback_averages_inverses():
    """M is the mean of the K inverse covariances, not the inverse of their mean."""
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    metric = ref.pullback_metric(scales[:, None, None] * torch.eye(2, dtype=F64), damping=0.1)
    assert_exact(metric, (1 / (scales**2 + 0.1)).mean() * torch.eye(2, dtype=F64), "M")


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_isotropic_jacobians_give_the_mean_square(damping):
    """Whatever their sizes, and however they rotate."""
    turned, _ = torch.linalg.qr(normal(6, 4, 5, 5, seed=2))
    delta, sizes = normal(6, 5, seed=1), normal(6, 4, seed=3).abs()[..., None, None] + 0.1
    assert_exact(ref.pullback_penalty(delta, sizes * turned, damping=damping), (delta**2).mean(-1), "M ∝ I")


def test_eps_takes_over_where_the_pullback_is_small():
    delta, eye = torch.ones(2, 2, dtype=F64), torch.eye(2, dtype=F64)
    jacobian = torch.stack([10 * eye, 0.1 * eye]).unsqueeze(1)  # tr M/d: 0.01 and 100
    penalty = ref.pullback_penalty(delta, jacobian, damping=0.0, eps=0.1)
    assert_exact(penalty, torch.tensor([0.01 / 0.1, 1.0], dtype=F64), "below and above ε")


@pytest.mark.parametrize("t", [0.0, 0.5, 0.8])
def test_pullback_of_a_gaussian(t):
    """M = Σ⁻¹ + (t/(1 − t))²·I for any action and any noise: the curvature of log p, and what the view adds."""
    gaussian, delta = anisotropic_gaussian(3), normal(4, 3, seed=1)
    penalty = ref.flow_pullback_penalty(
        gaussian.velocity, normal(4, 1), normal(4, 3, seed=2), delta, num_samples=3, t=t, num_steps=100,
        method="rk4", damping=0.0, normalize="none", generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    metric = torch.linalg.inv(gaussian.covariance) + (t / (1 - t)) ** 2 * torch.eye(3, dtype=F64)
    torch.testing.assert_close(penalty, sizes_by(metric, delta), rtol=1e-7, atol=0)


def test_pullback_by_hand():
    """One Euler step of v = A·x from t: J = (1 − t)·(I + (1 − t)·A); options are passed on."""
    a, t, delta = normal(3, 3, seed=1), 0.6, normal(2, 3, seed=2)
    jacobian = (1 - t) * (torch.eye(3, dtype=F64) + (1 - t) * a)
    metric = torch.linalg.inv(jacobian @ jacobian.mT + 0.2 * torch.eye(3, dtype=F64))
    options = {"t": t, "num_steps": 1, "num_samples": 2, "damping": 0.2}

    def penalty(**other: object) -> Tensor:
        return ref.flow_pullback_penalty(
            lambda x, t, c: x @ a.mT, normal(2, 1), normal(2, 3), delta, **options, **other
        )

    assert_exact(penalty(), sizes_by(metric, delta) / (metric.trace() / 3), "normalised")
    assert_exact(penalty(eps=1e3, reduction="sum"), sizes_by(metric, delta).sum() / 1e3, "ε, and the sum")
    assert_exact(penalty(normalize="none", reduction="mean"), sizes_by(metric, delta).mean(), "plain")


def test_pullback_sees_the_mode_of_its_action():
    """Of two far modes, each action gets the metric of its own."""
    near, far = anisotropic_gaussian(3, seed=1), anisotropic_gaussian(3, seed=2)
    modes = [Gaussian(near.mean - 4, near.covariance), Gaussian(far.mean + 4, far.covariance)]
    mixture, delta = Mixture((0.3, 0.7), tuple(modes)), normal(5, 3, seed=1)
    options = {"t": 0.8, "num_steps": 20, "method": "rk4", "damping": 0.0, "normalize": "none"}
    found = []
    for mode in modes:
        action, bridge = mode.sample(5, torch.Generator().manual_seed(2)), normal(5, 4, 3, seed=3)
        penalty = ref.flow_pullback_penalty(
            mixture.velocity, normal(5, 1), action, delta, bridge_noise=bridge, **options
        )
        metric = torch.linalg.inv(mode.covariance) + 16 * torch.eye(3, dtype=F64)
        torch.testing.assert_close(penalty, sizes_by(metric, delta), rtol=1e-5, atol=0)
        found.append(penalty)
    assert not torch.allclose(*found, rtol=0.05), "the modes are alike"


def test_log_density_of_a_gaussian():
    """log N(x0; 0, I) − log |det J| at the end of the flow, and the flow from the data back."""
    gaussian, x0 = anisotropic_gaussian(3), normal(6, 3)
    action, jacobian = ref.flow_jacobian(gaussian.velocity, x0, num_steps=100, method="rk4", clip=None)
    log_noise = -0.5 * (x0**2 + math.log(2 * math.pi)).sum(-1)
    log_p = log_noise - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_p, gaussian.log_prob_t(action, 1.0), rtol=0, atol=1e-6)


def test_pullback_differentiates_the_displacement_only():
    network = torch.nn.Linear(3 + 2 + 1, 3, dtype=F64)
    leaves = [x.requires_grad_() for x in (normal(5, 2), normal(5, 3, seed=1), normal(5, 4, 3, seed=2))]
    cond, action, bridge = leaves
    delta = normal(5, 3, seed=3).requires_grad_()
    penalty = ref.flow_pullback_penalty(
        lambda x, t, c: network(torch.cat([c, x, t], -1)), cond, action, delta, bridge_noise=bridge
    )
    (gradient,) = torch.autograd.grad(penalty.sum(), delta, retain_graph=True)
    assert_exact((gradient * delta).sum(-1), 2 * penalty, "a quadratic form in δ")
    penalty.sum().backward()
    assert all(leaf.grad is None for leaf in (*leaves, *network.parameters()))


def test_pullback_draws_from_the_generator():
    velocity, cond = two_modes(3).velocity, normal(5, 2)
    action, delta = normal(5, 3, seed=1), normal(5, 3, seed=2)

    def penalty(seed: int, **given: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return ref.flow_pullback_penalty(velocity, cond, action, delta, num_samples=6, generator=source, **given)

    bridge = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    assert torch.equal(penalty(3), penalty(3)), "the same seed gave two penalties"
    assert torch.equal(penalty(3), penalty(4, bridge_noise=bridge)), "given noise is not used"
    assert not torch.equal(penalty(3), penalty(4)), "the seed plays no part"


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ref.velocity_to_score(x, x, 0.5, path="curved"), KeyError, "curved"),
        (lambda x: ref.velocity_to_score(x, x, 0.5, convention="guess"), ValueError, "guess"),
        (lambda x: ref.velocity_to_score(x, x, 0.5, path="vp", convention="velocity"), ValueError, "linear.*vp"),
        (lambda x: ref.integrate_flow(lambda x, t, c: x, x, method="leap"), KeyError, "leap"),
        (lambda x: ref.fisher_penalty(x[0], x, normalize="det"), ValueError, "det"),
        (lambda x: ref.fisher_penalty(x[0], x, reduction="max"), KeyError, "max"),
        (lambda x: ref.flow_jacobian(lambda x, t, c: x, x, method="leap"), KeyError, "leap"),
        (lambda x: ref.pullback_penalty(x[0], x[None, :3], normalize="det"), ValueError, "pullback_penalty.*det"),
        (lambda x: ref.pullback_penalty(x[0], x[None, :3], reduction="max"), KeyError, "max"),
    ],
)
def test_unknown_names_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(normal(4, 3))
