"""The measures behind docs/science, where the answer is known, and the command that asks them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fdkernels
from benchmarks import science
from benchmarks.evidence import gain, kl, report, returns, settings
from benchmarks.evidence.densities import DENSITIES, Gaussian, observe
from benchmarks.evidence.likelihood import log_prob, noise_of
from benchmarks.evidence.metrics import METRICS, Metric, score
from train.data.synthetic import random_dataset
from train.data.transitions import OfflineDataset

F64 = torch.float64


@pytest.mark.parametrize("name", [name for name in DENSITIES if name != "gaussian-6"])
def test_densities_sum_to_one_and_describe_their_samples(name: str) -> None:
    density, side = DENSITIES[name], torch.linspace(-2, 2, 801, dtype=F64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    p = density.log_prob(torch.full((len(grid),), 0.8, dtype=F64), grid).exp() * (side[1] - side[0]) ** 2
    torch.manual_seed(0)
    sample = density.sample(torch.full((100_000,), 0.8, dtype=F64))
    mean = p @ grid
    assert p.sum() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(sample.mean(0), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(torch.cov(sample.T), (grid - mean).T * p @ (grid - mean), atol=3e-3, rtol=0)


def test_the_exact_velocity_carries_noise_to_the_gaussian() -> None:
    density = DENSITIES["gaussian-6"]
    assert isinstance(density, Gaussian)
    angle = torch.full((1,), 2.0, dtype=F64)
    _, jacobian = fdkernels.flow_jacobian(
        density.velocity, torch.randn(1, 6, dtype=F64), observe(angle), num_steps=200, method="rk4", clip=None
    )
    torch.testing.assert_close(jacobian @ jacobian.mT, density.covariance(angle), atol=1e-6, rtol=0)


def test_the_best_metric_has_the_whole_share() -> None:
    question = gain.Question("gaussian-6", 0)
    covariance = question.covariance(None)
    identity = torch.eye(6, dtype=F64).expand_as(covariance)
    best = question.shares_of(torch.linalg.inv(covariance), covariance)
    assert best == pytest.approx({"of_each": 1, "of_all": 1, "of_all_raw": 1})
    assert max(question.shares_of(identity, covariance).values()) < 0.5


def known(matrix: Any, local: bool) -> Metric:
    return Metric(matrix, local=local)


def test_a_gaussian_pays_half_of_the_squared_mahalanobis_distance() -> None:
    density, question = DENSITIES["gaussian-2"], kl.Question("gaussian-2", 0)
    assert isinstance(density, Gaussian)
    precision = torch.linalg.inv(density.covariance(question.angle))
    bill = kl.Bill(question, known(lambda *_: precision, False), fdkernels.VelocityMLP(2, 2, (4,)))
    delta = 0.01 * bill.delta
    exact = 0.5 * (delta * (precision @ delta)).sum(1).mean().item()
    assert bill.divergence(0.01) == pytest.approx(exact, rel=1e-6)
    # δ = M⁻¹g with M ∝ Σ⁻¹ is the best there is: g·δ = √(2·budget·gᵀΣg)
    scale = bill.scale(1e-3)
    assert bill.divergence(scale) == pytest.approx(1e-3, rel=1e-6)


def test_the_order_of_the_error_is_measured() -> None:
    """KL = c²·(1 + 0.5·c^1.5) has an error of order 1.5."""

    def scale(budget: float) -> float:
        low, high = 0.0, 10.0
        for _ in range(80):
            c = (low + high) / 2
            low, high = (c, high) if c**2 * (1 + 0.5 * c**1.5) < budget else (low, c)
        return low

    assert kl.order([scale(budget) for budget in kl.BUDGETS]) == pytest.approx(1.5, abs=0.3)
    assert kl.order([budget**0.5 for budget in kl.BUDGETS]) is None


def test_the_optimum_is_that_of_a_tilted_gaussian() -> None:
    density, question = DENSITIES["gaussian-2"], kl.Question("gaussian-2", 0)
    assert isinstance(density, Gaussian)
    exact = (question.g * (density.covariance(question.angle) @ question.g)).sum(1).mean().item()
    assert question.optimum() == pytest.approx(exact, rel=0.02)


def test_what_stretches_the_density_is_paid_for() -> None:
    """δ = s·(a − μ) widens a Gaussian, whose divergence is then known for actions with the density's own moments."""
    density, question = DENSITIES["gaussian-2"], kl.Question("gaussian-2", 0)
    assert isinstance(density, Gaussian)
    bill = kl.Bill(question, METRICS["isotropic"], fdkernels.VelocityMLP(2, 2, (4,)))
    mean, axes, deviations = density.parts(question.angle)
    white = torch.linalg.solve(axes * deviations.unsqueeze(1), (question.action - mean).unsqueeze(-1)).squeeze(-1)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T, correction=0))).T
    question.action = mean + (axes * deviations.unsqueeze(1) @ white.unsqueeze(-1)).squeeze(-1)
    bill.delta = (question.action - mean).unsqueeze(-1).expand(-1, -1, 2)
    bill.slope = torch.eye(2, dtype=F64).expand(kl.STATES, 2, 2, 2)
    for s in (0.1, -0.2):
        assert bill.divergence(s) == pytest.approx((1 + s) ** 2 - 1 - 2 * math.log(1 + s), rel=1e-9)
        assert bill.folded(s) == 0
    bill.slope = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    assert bill.folded(-1.5) == 1


def test_differences_find_how_a_local_metric_changes() -> None:
    question = kl.Question("gaussian-2", 0, g=torch.tensor([1.0, 0.0], dtype=F64))
    flow = fdkernels.VelocityMLP(2, 2, (4,))

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        action = fdkernels.integrate_flow(velocity, noise, obs, num_steps=20, method="rk4", clip=None)
        wide = torch.stack([(0.3 * action[:, 0]).exp(), torch.ones_like(action[:, 0])], -1)
        return torch.diag_embed(wide / wide.mean(-1, keepdim=True))

    bill = kl.Bill(question, known(matrix, True), flow)
    a = question.action[:, 0]
    along = (1 + (0.3 * a).exp()) / 2 / (0.3 * a).exp()
    torch.testing.assert_close(bill.delta[:, 0, 0], along, atol=1e-5, rtol=0)
    torch.testing.assert_close(bill.slope[:, 0, 0, 0], -0.15 * (-0.3 * a).exp(), atol=1e-5, rtol=0)
    assert bill.slope[:, 0, :, 1].abs().max() < 1e-5


def test_a_flow_knows_the_density_of_its_actions() -> None:
    torch.manual_seed(0)
    flow = fdkernels.VelocityMLP(2, 2, (16,)).double().requires_grad_(False)
    obs, noise = torch.randn(64, 2, dtype=F64), torch.randn(64, 2, dtype=F64)
    action = fdkernels.integrate_flow(flow, noise, obs, num_steps=20, method="rk4", clip=None)
    torch.testing.assert_close(noise_of(flow, obs, action), noise, atol=1e-6, rtol=0)
    side = torch.linspace(-8, 8, 161, dtype=F64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    p = log_prob(flow, obs[:1].expand(len(grid), 2), grid).exp()
    assert (p.sum() * 0.01).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("label", METRICS)
def test_metrics_by_action_are_marked_and_all_are_finite(label: str) -> None:
    torch.manual_seed(0)
    flow = fdkernels.VelocityMLP(2, 2, (8,)).requires_grad_(False)
    obs, noise = torch.randn(3, 2), torch.randn(3, 2)

    def matrix(noise: Tensor) -> Tensor:
        torch.manual_seed(1)
        return METRICS[label].matrix(flow, obs, noise)

    assert matrix(noise).shape == (3, 2, 2)
    assert matrix(noise).isfinite().all()
    assert torch.equal(matrix(noise), matrix(noise + 0.1)) == (not METRICS[label].local)


def test_the_cross_estimate_replaces_one_score() -> None:
    """For velocity zero the score is −x/(1 − t), and b = −x0/(1 − t), so that all sums are known."""
    k, t = 6, 0.95
    obs, noise = torch.randn(2, 2), torch.randn(2, 2)
    torch.manual_seed(3)
    bridge = torch.randn(2, k, 2)
    torch.rand(2, k, 1)  # times, which are equal here
    start = torch.randn(2, k, 2)
    s, b = -((1 - t) * bridge + t * start) / (1 - t), -bridge / (1 - t)
    expected = (s.mT @ b + b.mT @ s) / (2 * k) + 1e-3 * torch.eye(2)
    torch.manual_seed(3)
    found = score(k, t, cross=True)(lambda x, t, cond: 0 * x, obs, noise)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-2)


def fake_answers(section: str, updates: tuple[int, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        for n in updates:
            if section == "gain":
                shares = {label: {"of_each": 0.5, "of_all": 0.4, "of_all_raw": 0.3} for label in [*METRICS, "exact"]}
                found += [{"density": d, "updates": n, "seed": seed, "shares": shares} for d in gain.NAMES]
            elif section == "kl":
                row = {"updates": n, "seed": seed, "order": dict.fromkeys(kl.ASKED)}
                for key in ("ratios", "shares", "folded"):
                    row[key] = {label: [1.0 + seed] * len(kl.BUDGETS) for label in kl.ASKED}
                found += [{"density": d, **row} for d in kl.NAMES]
            elif section == "settings":
                values = dict.fromkeys(settings.settings(), 1.5)
                row = {"updates": n, "seed": seed, "values": values, "calibration": 0.9}
                found += [{"density": d, **row} for d in ("gaussian-2", "ring")]
        if section == "returns":
            found += [
                {
                    "env": env, "seed": seed, "variant": variant, "alpha": alpha, "fall": 1 / alpha, "gain": 1.0,
                    "mean_square": 0.1, "scores": [1.0, 2.0],
                }
                for env, weights in returns.WEIGHTS.items()
                for variant in returns.VARIANTS
                for alpha in weights
            ]  # fmt: skip
            found += [
                {"env": env, "seed": seed, "variant": "flow", "alpha": None, "scores": [0.5]} for env in returns.ENVS
            ]
    return found


@pytest.mark.parametrize("section", science.SECTIONS)
def test_reports_are_drawn_from_answers(section: str, tmp_path: Path) -> None:
    (tmp_path / section).mkdir()
    for i, found in enumerate(fake_answers(section, (4_000, 30_000))):
        (tmp_path / section / f"{i}.json").write_text(json.dumps(found))
    table, picture = report.draw(tmp_path, tmp_path / "out", science.SECTIONS)
    assert picture.stat().st_size > 10_000
    assert {"gain": "0.50", "kl": "1.50 (1.00 to 2.00)", "settings": "1.50", "returns": "1.5"}[
        section
    ] in table.read_text()


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    arguments = ["gain", "--quick", "--data", str(tmp_path / "data"), "--workers", "1"]
    pool = mock.patch.object(science.concurrent.futures, "ProcessPoolExecutor", InProcess)
    with pool, mock.patch.object(gain, "answer", side_effect=fake_answer) as asked:
        assert science.main(arguments) == 0
        assert asked.call_count == 10
        next((tmp_path / "data" / "quick" / "gain").glob("*.json")).unlink()
        assert science.main(arguments) == 0
        assert asked.call_count == 11
    assert (tmp_path / "data" / "quick" / "report" / "gain.png").exists()  # not in docs/science


def fake_answer(name: str, updates: int, seed: int, data: Path) -> dict[str, Any]:
    shares = {label: {"of_each": 0.5, "of_all": 0.4, "of_all_raw": 0.3} for label in [*METRICS, "exact"]}
    return {"density": name, "updates": updates, "seed": seed, "shares": shares}


class InProcess:
    """A pool without processes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Any = science.concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def test_returns_start_all_metrics_from_the_same_weights(tmp_path: Path) -> None:
    few = {"flow_warmup": 3, "critic_warmup": 2, "steps": 2}
    env, described = "hopper-simple", {"scores": [1.0]}
    seen: list[dict[str, Tensor]] = []

    def describe(run: Any, judge: Any) -> dict[str, Any]:
        seen.append({name: p.detach().clone() for name, p in run.learner.named_parameters()})
        return described

    changed = mock.patch.object(returns, "QUICK", few)
    with (
        changed,
        mock.patch.object(returns, "describe", describe),
        mock.patch.object(returns, "load_dataset", small_data),
    ):
        first = returns.answer(env, 0, "isotropic", 4.0, tmp_path, True)
        returns.answer(env, 0, "pullback", 4.0, tmp_path, True)
        again = returns.answer(env, 0, "isotropic", 4.0, tmp_path, True)
    assert first["variant"] == "isotropic"
    assert first["alpha"] == 4.0
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in seen[0])
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0] if not name.startswith("actor"))
    assert first["figures"] == again["figures"]


def small_data(spec: Any) -> OfflineDataset:
    return random_dataset(300, 11, 3)
