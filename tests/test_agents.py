"""Promises of the agents beyond parity with the published ones."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels_ref
from train.agents import AGENTS
from train.agents.base import Agent, Draws, Part
from train.agents.decorator import DecoratorAgent
from train.agents.fidec import FiDec, FiDecConfig, MetricName, cross_penalty, pullback_spectrum
from train.data.transitions import Batch

SMALL: dict[str, Any] = {"actor_hidden": (16, 16), "critic_hidden": (16,), "flow_steps": 3, "num_fisher_samples": 3}


def make(name: str, **changes: object) -> tuple[Agent, torch.optim.Optimizer, Batch]:
    kind = AGENTS[name]
    agent = kind(kind.hyperparameters(**{**SMALL, **changes}), 5, 2)
    batch = Batch(torch.randn(32, 5), torch.rand(32, 2) * 2 - 1, torch.randn(32), torch.randn(32, 5), torch.ones(32))
    return agent, agent.make_optimizer(), batch


@pytest.mark.parametrize("name", AGENTS)
def test_metrics_are_finite_and_documented(name: str) -> None:
    agent, optimizer, batch = make(name)
    figures = agent.metrics(batch, agent.update(optimizer, batch, agent.draw(32), log=True))
    assert set(figures) <= set(agent.metric_names)
    assert all(torch.isfinite(value) for value in figures.values()), figures
    assert {"flow_loss", "critic_loss", "penalty", "q_policy", "action_error"} <= set(figures)
    if name == "fidec":
        assert 1 / 2 <= figures["top_eigenvalue_share"] <= 1


@pytest.mark.parametrize(("part", "moves"), [("flow", "flow."), ("critic", "critic."), ("actor", "actor.")])
def test_each_loss_moves_only_what_it_is_for(part: Part, moves: str) -> None:
    agent, optimizer, batch = make("fidec")
    before = {name: p.clone() for name, p in agent.named_parameters()}
    agent.update(optimizer, batch, agent.draw(32), parts=(part,))
    for name, parameter in agent.named_parameters():
        expected = name.startswith(moves) or (part == "actor" and name == "log_alpha")
        if not name.startswith("target_critic"):
            assert torch.equal(parameter, before[name]) != expected, name


def test_a_frozen_flow_has_no_loss_but_keeps_its_momentum() -> None:
    agent, optimizer, batch = make("fidec", freeze_flow_after=2)
    for updates in range(4):
        parts = agent.agent_parts(updates)
        before = [p.clone() for p in agent.flow.parameters()]
        seen = agent.update(optimizer, batch, agent.draw(32), parts, log=True)
        assert ("flow_loss" in seen) == (updates < 2)
        assert not any(torch.equal(p, old) for p, old in zip(agent.flow.parameters(), before))
    assert all(not p.grad.any() for p in agent.flow.parameters())


def test_a_flow_that_only_its_warm_up_trains_stays_as_it_is() -> None:
    agent, optimizer, batch = make("fidec", freeze_flow_after=0)
    agent.update(optimizer, batch, agent.draw(32), ("flow",))
    before = [p.clone() for p in agent.flow.parameters()]
    for updates in range(2):
        agent.update(optimizer, batch, agent.draw(32), agent.agent_parts(updates))
    assert all(torch.equal(p, old) for p, old in zip(agent.flow.parameters(), before))


def test_frozen_critics_stay_as_they_are() -> None:
    agent, optimizer, batch = make("fidec", freeze_critic_after=1)
    for updates in range(3):
        parts = agent.agent_parts(updates)
        critics = [*agent.critic.parameters(), *agent.target_critic.parameters()]
        before = [p.clone() for p in critics]
        seen = agent.update(optimizer, batch, agent.draw(32), parts, log=True)
        assert {"flow_loss", "actor_loss"} < set(seen)
        assert ("critic_loss" in seen) == (updates == 0)
        assert all(torch.equal(p, old) for p, old in zip(critics, before)) == (updates > 0)


def test_refinement_can_start_at_the_behaviour_flow() -> None:
    agent, _, batch = make("fidec", zero_init_displacement=True)
    noise = torch.randn(32, 2)
    assert torch.equal(agent.act(batch.observations, noise), agent.flow_action(batch.observations, noise))


@pytest.mark.parametrize("name", ["fidec", "deflow"])
def test_the_multiplier_steers_the_penalty(name: str) -> None:
    for target, rises in ((1e-9, True), (1e3, False)):
        agent, optimizer, batch = make(name, target_divergence=target)
        assert isinstance(agent, DecoratorAgent)
        before = agent.log_alpha.item()
        agent.update(optimizer, batch, agent.draw(32))
        assert (agent.log_alpha.item() > before) == rises


def test_draws() -> None:
    agent, _, _ = make("fidec", fisher_t=0.9, fisher_t_width=0.2)
    assert isinstance(agent, FiDec)
    draws = agent.draw(500, torch.Generator().manual_seed(0))
    again = agent.draw(500, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(draws[:-1], again[:-1]))
    assert draws.shift is again.shift is None, "states are not augmented"
    assert draws.fisher_noise.shape == draws.bridge_noise.shape == (500, 3, 2)
    assert 0.7 <= draws.fisher_t.min() < 0.71
    assert 0.89 < draws.fisher_t.max() < 0.9
    assert 0 <= draws.flow_t.min() < 0.01
    assert not torch.equal(draws.next_noise, draws.base_noise)
    assert make("deflow")[0].draw(4).fisher_noise is None


@pytest.mark.parametrize("name", AGENTS)
def test_actions_stay_in_bounds(name: str) -> None:
    agent, _, batch = make(name)
    torch.nn.init.normal_(agent.actor[-1].weight, std=10.0)  # type: ignore[arg-type]
    assert agent.act(batch.observations, torch.randn(32, 2)).abs().max() == 1


# -- how FiDec measures the displacement ------------------------------------------------------------------------------

METRICS = typing.get_args(MetricName)


def fidec(metric: str, **changes: object) -> tuple[FiDec, torch.optim.Optimizer, Batch]:
    agent, _, batch = make("fidec", metric=metric, **changes)
    assert isinstance(agent, FiDec)
    return agent.double(), agent.make_optimizer(), Batch(*(column.double() for column in batch if column is not None))


def penalty_of(agent: FiDec, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The displacement, its penalty, and the flows from which both come."""
    flows = agent.integrate(batch, draws, ("actor",))
    displacement = agent.displacement(batch.observations, flows["base"])
    return displacement, agent.penalty(batch.observations, displacement, draws, flows, False)[0], flows


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_every_metric(metric: str) -> None:
    agent, optimizer, batch = fidec(metric)
    figures = agent.metrics(batch, agent.update(optimizer, batch, agent.draw(32), log=True))
    assert all(torch.isfinite(value) for value in figures.values()), figures
    assert set(figures) <= set(agent.metric_names)
    assert ("fisher_trace_per_dim" in figures) == ("top_eigenvalue_share" in figures) == (metric != "isotropic")
    assert 1 / 2 <= figures.get("top_eigenvalue_share", torch.tensor(0.5)) <= 1


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--metric must be one of score, .* got euclid"):
        make("fidec", metric="euclid")


def test_isotropic_is_deflow() -> None:
    agent, optimizer, batch = fidec("isotropic")
    other = make("deflow")[0].double()
    other.load_state_dict(agent.state_dict())
    draws = agent.draw(32, torch.Generator().manual_seed(1))
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip(draws, other.draw(32, torch.Generator().manual_seed(1)))
    )
    ours = agent.update(optimizer, batch, draws, log=True)
    theirs = other.update(other.make_optimizer(), batch, draws, log=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("total_loss", "row_penalty", "policy_actions"))
    assert all(map(torch.equal, agent.state_dict().values(), other.state_dict().values()))


def test_pullback_is_the_penalty_of_the_flow_at_the_base_action() -> None:
    changes = {"pullback_t": 0.6, "pullback_steps": 3, "pullback_damping": 0.01}
    agent, _, batch = fidec("pullback", **changes)
    draws = agent.draw(32)
    displacement, penalty, flows = penalty_of(agent, batch, draws)
    expected = fdkernels_ref.flow_pullback_penalty(
        agent.flow, batch.observations, flows["base"], displacement, t=0.6, num_steps=3, damping=0.01,
        bridge_noise=draws.bridge_noise,
    )  # fmt: skip
    torch.testing.assert_close(penalty, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("metric", ["score", "cross"])
def test_score_and_cross_take_the_same_scores(metric: str) -> None:
    agent, _, batch = fidec(metric, fisher_t=0.9, fisher_damping=0.02)
    draws = agent.draw(32)
    displacement, penalty, flows = penalty_of(agent, batch, draws)
    found, score = fdkernels_ref.flow_fisher_penalty(
        agent.flow, batch.observations, displacement, t=0.9, damping=0.02, noise=flows["fisher"], time_grid=[0.0, 0.0],
        clip=None, bridge_noise=draws.bridge_noise, num_samples=3, return_score=True,
    )  # fmt: skip
    if metric == "cross":
        found = cross_by_matrix(displacement, score, -draws.bridge_noise / 0.1, agent.config)
    torch.testing.assert_close(penalty, found, rtol=1e-7, atol=1e-12)


def cross_by_matrix(displacement: Tensor, score: Tensor, noise_score: Tensor, config: FiDecConfig) -> Tensor:
    """δᵀĈδ/d from the matrix C = (1/K)·Σ_k sym(s_k·b_kᵀ) + λI, whose mean trace over the batch normalises it."""
    d = displacement.shape[-1]
    matrix = torch.einsum("nki,nkj->nij", score, noise_score) / score.shape[1]
    matrix = (matrix + matrix.mT) / 2 + config.fisher_damping * torch.eye(d, dtype=score.dtype)
    trace = torch.einsum("nii->n", matrix).mean() / d
    return (
        torch.einsum("ni,nij,nj->n", displacement, matrix, displacement)
        / d
        / max(trace, config.fisher_damping, config.fisher_trace_eps)
    )


@pytest.mark.parametrize(("damping", "eps"), [(0.3, 1e-6), (0.0, 1e3)])
def test_cross_penalty(damping: float, eps: float) -> None:
    """By its formula; and for b = s it is the Fisher penalty, with the trace of the batch."""
    config = FiDecConfig(fisher_damping=damping, fisher_trace_eps=eps)
    displacement, score, other = torch.randn(6, 3), torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    displacement, score, other = displacement.double(), score.double(), other.double()
    torch.testing.assert_close(
        cross_penalty(displacement, score, score + other, config),
        cross_by_matrix(displacement, score, score + other, config),
    )
    plain = fdkernels_ref.fisher_penalty(displacement, score, damping=damping, normalize="none")
    trace = (score.square().sum((-2, -1)).mean() / 4 / 3 + damping).clamp(min=eps)
    torch.testing.assert_close(cross_penalty(displacement, score, score, config), plain / trace)


@pytest.mark.parametrize("metric", METRICS)
def test_draws_and_starts_are_what_is_used(metric: str) -> None:
    """And `flow_evaluations` counts the rows of the flow that they begin."""
    agent, _, batch = fidec(metric, fisher_t_width=0.1)
    draws = agent.draw(32)
    scores, views = metric in ("score", "cross"), metric != "isotropic"
    assert (draws.fisher_noise is not None) == (draws.fisher_t is not None) == scores
    assert (draws.bridge_noise is not None) == views
    assert not views or draws.bridge_noise.shape == (32, 3, 2)
    starts = agent.starts(batch, draws, ("critic", "flow", "actor"))
    assert set(starts) == {"base", "next", *(["fisher"] if scores else [])}
    rows = sum(noise[..., 0].numel() for noise, _ in starts.values()) // 32
    more = 3 if scores else 2 * 3 * (1 + 2) if views else 0  # for the scores, or the views and their tangents
    assert agent.flow_evaluations(agent.config, 2) == 3 * rows + more


@pytest.mark.parametrize("metric", METRICS)
def test_a_penalty_moves_the_displacement_alone(metric: str) -> None:
    agent, _, batch = fidec(metric)
    _, penalty, _ = penalty_of(agent, batch, agent.draw(32))
    penalty.sum().backward()
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is not None) == name.startswith("actor."), name


def test_the_pullback_spectrum_is_that_of_the_metric() -> None:
    jacobian = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(fdkernels_ref.pullback_metric(jacobian, damping=0.01)).flip(-1)
    torch.testing.assert_close(pullback_spectrum(jacobian, 0.01), spectrum)
    jacobian[2, 1, 0, 3] = torch.nan
    found = pullback_spectrum(jacobian, 0.01)
    assert found[2].isnan().all()
    torch.testing.assert_close(found[[0, 1, 3, 4]], spectrum[[0, 1, 3, 4]])
