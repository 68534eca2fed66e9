"""Acting rules on known actions and values. Recorded cases also test the published rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fdkernels.policy import Acting
from fdkernels.policy.acting import REFINING_RULES, RULES
from train.agents import AGENTS
from train.agents.base import Agent

OBS = torch.zeros(3, 5)


class Value(nn.Module):
    """Two critics whose mean is 10 + the action's first number − the observation's."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        q = 10 + (action - obs[..., : action.shape[-1]])[..., 0]
        return torch.stack([q - 3, q + 3])


def shift(action: Tensor) -> Tensor:
    """A displacement that raises a low Q by a quarter and lowers any other."""
    return torch.where(action[..., :1] < 0.3, 0.25, -1.0).expand_as(action)


def make(name: str = "fidec", monkeypatch: pytest.MonkeyPatch | None = None) -> Agent:
    """An agent. With ``monkeypatch``, its flow's actions are its clipped noise, and `shift` refines them."""
    kind = AGENTS[name]
    agent = kind(kind.hyperparameters(actor_hidden=(16, 16), critic_hidden=(16,), flow_steps=2), 5, 2)
    if monkeypatch is not None:
        agent.critic = Value()  # type: ignore[assignment]
        monkeypatch.setattr(agent, "flow_action", lambda obs, noise: noise.clamp(-1, 1))
        monkeypatch.setattr(agent, "displacement", lambda obs, action: shift(action), raising=False)
    return agent


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_a_policy(name: str, rule: str) -> None:
    agent, acting = make(name), Acting(rule, num_samples=7)  # type: ignore[arg-type]
    obs, noise = torch.randn(3, 5), acting.draw(agent, 3, torch.Generator().manual_seed(0))
    assert noise.shape == (3, 7 if rule.endswith("-n") else 1, 2)
    if rule in REFINING_RULES and not agent.refines:
        with pytest.raises(TypeError, match=f"{type(agent).__name__} has nothing that does"):
            acting(agent, obs, noise)
        return
    actions = acting(agent, obs, noise)
    assert actions.shape == (3, 2)
    assert actions.abs().max() <= 1
    assert not actions.requires_grad
    torch.testing.assert_close(actions[1:2], acting(agent, obs[1:2], noise[1:2]))  # states are independent


def test_what_each_rule_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(monkeypatch=monkeypatch)
    noise = torch.tensor([[[0.1, 0.7], [0.5, -0.2], [-0.9, 0.0]], [[-0.3, 0.1], [0.2, 0.2], [0.9, -0.4]]])
    for rule, expected in {
        "sample": [[0.35, 0.95], [-0.05, 0.35]],
        "best-of-n": [[-0.5, -1.0], [-0.1, -1.0]],
        "iterated": [[0.35, 0.95], [0.45, 0.85]],  # after one refinement, and after three
        "best-flow-of-n": [[0.5, -0.2], [0.9, -0.4]],
        "best-refined-of-n": [[0.35, 0.95], [0.45, 0.45]],
    }.items():
        actions = Acting(rule)(agent, OBS[:2], noise)  # type: ignore[arg-type]
        torch.testing.assert_close(actions, torch.tensor(expected), msg=rule)
    assert torch.equal(Acting("flow")(agent, OBS[:2], noise), noise[:, 0])


def test_the_mean_is_weighted_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, noise = make(monkeypatch=monkeypatch), torch.rand(3, 6, 2, dtype=torch.float64) * 2 - 1
    obs = OBS.double()
    q = 10 + noise[..., 0]
    for temperature in (0.01, 0.1):
        weights = torch.exp(q / (temperature * q.mean(1, keepdim=True)))
        expected = (weights.unsqueeze(-1) * noise).sum(1) / weights.sum(1, keepdim=True)
        torch.testing.assert_close(Acting("mean-flow-of-n", 6, temperature)(agent, obs, noise), expected)
    torch.testing.assert_close(Acting("mean-flow-of-n", 6, 1e6)(agent, obs, noise), noise.mean(1), rtol=0, atol=1e-5)
    refined = Acting("mean-refined-of-n", 6, 1e6)(agent, obs, noise)
    torch.testing.assert_close(refined, (noise + shift(noise)).clamp(-1, 1).mean(1), rtol=0, atol=1e-5)
    best = Acting("best-flow-of-n", 6)(agent, obs, noise)
    torch.testing.assert_close(Acting("mean-flow-of-n", 6, 1e-6)(agent, obs, noise), best)


@pytest.mark.parametrize("rule", ["best-flow-of-n", "mean-flow-of-n"])
def test_of_one_there_is_no_choice(rule: str) -> None:
    agent, obs, noise = make(), torch.randn(3, 5), torch.randn(3, 1, 2)
    torch.testing.assert_close(Acting(rule)(agent, obs, noise), Acting("flow")(agent, obs, noise))  # type: ignore[arg-type]
    torch.testing.assert_close(Acting("best-of-n")(agent, obs, noise), Acting("sample")(agent, obs, noise))


def test_names_and_bad_settings() -> None:
    assert [str(Acting("mean-flow-of-n", 16)), str(Acting("best-flow-of-n", 4)), str(Acting())] == [
        "mean-flow-of-16",
        "best-flow-of-4",
        "sample",
    ]
    with pytest.raises(ValueError, match=r"rule must be one of 'sample', .*, got 'best'"):
        Acting("best")  # type: ignore[arg-type]
    for name, bad in (("num_samples", 0), ("num_samples", 10_001), ("temperature", 0.0), ("temperature", math.nan)):
        with pytest.raises(ValueError, match=f"Acting: {name} must be .*, got {bad}"):
            Acting(**{name: bad})  # type: ignore[arg-type]
