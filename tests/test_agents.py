"""Promises of the agents beyond parity with the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.agents import AGENTS
from train.agents.base import Agent, Part
from train.agents.decorator import DecoratorAgent
from train.agents.fidec import FiDec
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
    assert all(torch.equal(a, b) for a, b in zip(draws, again))
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
