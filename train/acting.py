"""How a trained agent acts: how many actions it draws, which of them it takes, and whether it refines them.

Every rule maps observations (B, c) from `Agent.observe` and N(0, I) noise (B, N, d), N at least one, to actions (B, d)
within [-1, 1]. The first three are FiDec's published rules (arXiv 2604.17919), with N = 10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from train.agents.base import Agent

RuleName = Literal[
    "sample",
    "best-of-n",
    "iterated",
    "best-flow-of-n",
    "best-refined-of-n",
    "mean-flow-of-n",
    "mean-refined-of-n",
]
Policy: TypeAlias = Callable[[Agent, Tensor, Tensor], Tensor]

REFINEMENTS = 5
MOST_SAMPLES = 10_000
"""The largest N: the critics' hidden layers take 2 kB for each sample of each state."""


@dataclasses.dataclass(frozen=True)
class Acting:
    """A rule with its settings. It is a policy: call it with (agent, observations, noise)."""

    rule: RuleName = "sample"
    num_samples: int = 10
    """N, the actions drawn per state."""
    temperature: float = 0.004
    """Softmax temperature of the weighted means, as a share of mean |Q|."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"Acting: rule must be one of {', '.join(map(repr, RULES))}, got {self.rule!r}")
        if self.num_samples < 1 or not self.temperature > 0:
            raise ValueError(
                f"Acting: num_samples and temperature must be positive, got {self.num_samples} and {self.temperature}"
            )
        if self.num_samples > MOST_SAMPLES:
            raise ValueError(f"Acting: num_samples must be at most {MOST_SAMPLES:,}, got {self.num_samples:,}")

    def __str__(self) -> str:
        return self.rule.replace("-n", f"-{self.num_samples}")

    def draw(self, agent: Agent, rows: int, generator: torch.Generator) -> Tensor:
        """Noise for ``rows`` states, (rows, N, d)."""
        count = self.num_samples if self.rule.endswith("-n") else 1
        device, dtype = agent.obs_mean.device, agent.obs_mean.dtype
        return torch.randn(rows, count, agent.action_dim, generator=generator, device=device, dtype=dtype)

    def __call__(self, agent: Agent, obs: Tensor, noise: Tensor) -> Tensor:
        return RULES[self.rule](agent, obs, noise, self.temperature)


def flow_alone(agent: Agent, obs: Tensor, noise: Tensor) -> Tensor:
    """One action of the flow, without its displacement (δ = 0)."""
    return agent.flow_action(obs, noise[:, 0])


def sample(agent: Agent, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """One action of the policy."""
    return agent.act(obs, noise[:, 0])


def best_of_n(agent: Agent, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Draw N flow actions, take the one with the highest mean Q, and refine it once."""
    return agent.refine(obs, best_flow_of_n(agent, obs, noise, temperature))


def iterated(agent: Agent, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """Refine one flow action five times; of these six actions, take the one with the highest mean Q."""
    iterates = [flow_alone(agent, obs, noise)]
    for _i in range(REFINEMENTS):
        iterates.append(agent.refine(obs, iterates[-1]))
    return highest_q(agent, obs, torch.stack(iterates, dim=1))


def best_flow_of_n(agent: Agent, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """The flow action with the highest mean Q of N, not refined."""
    return highest_q(agent, obs, agent.flow_action(each(obs, noise), noise))


def best_refined_of_n(agent: Agent, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """The policy's action with the highest mean Q of N."""
    return highest_q(agent, obs, agent.act(each(obs, noise), noise))


def mean_flow_of_n(agent: Agent, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The `weighted_mean` of N flow actions."""
    return weighted_mean(agent, obs, agent.flow_action(each(obs, noise), noise), temperature)


def mean_refined_of_n(agent: Agent, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The `weighted_mean` of N of the policy's actions."""
    return weighted_mean(agent, obs, agent.act(each(obs, noise), noise), temperature)


RULES: dict[RuleName, Callable[[Agent, Tensor, Tensor, float], Tensor]] = {
    "sample": sample,
    "best-of-n": best_of_n,
    "iterated": iterated,
    "best-flow-of-n": best_flow_of_n,
    "best-refined-of-n": best_refined_of_n,
    "mean-flow-of-n": mean_flow_of_n,
    "mean-refined-of-n": mean_refined_of_n,
}
FOR_REFINING_AGENTS: tuple[RuleName, ...] = ("best-of-n", "iterated")
"""Rules that call `Agent.refine`."""


def each(obs: Tensor, noise: Tensor) -> Tensor:
    """Each state's observation, repeated for each of its noise vectors: (B, N, c)."""
    return obs.unsqueeze(1).expand(-1, noise.shape[1], -1)


def mean_q(agent: Agent, obs: Tensor, actions: Tensor) -> Tensor:
    """Mean of both critics' Q for each state's actions (B, N, d): (B, N)."""
    qs = agent.critic(each(agent.view("critic", obs), actions).flatten(0, 1), actions.flatten(0, 1))
    return qs.mean(0).view(actions.shape[:2])


@torch.no_grad()
def highest_q(agent: Agent, obs: Tensor, actions: Tensor) -> Tensor:
    """For each state, the action with the highest `mean_q` among (B, N, d): (B, d)."""
    return actions[torch.arange(len(actions), device=actions.device), mean_q(agent, obs, actions).argmax(1)]


@torch.no_grad()
def weighted_mean(agent: Agent, obs: Tensor, actions: Tensor, temperature: float) -> Tensor:
    """The mean of each state's actions (B, N, d), weighted by exp(Q / (temperature · mean |Q|)): (B, d).

    Path-integral control weights its samples in the same way (MPPI, arXiv 1509.01149). The weights choose between
    modes of the data that differ in value, and average within a mode. An average is less extreme than the best of many
    actions, which exploits the critic's errors.
    """
    q = mean_q(agent, obs, actions)
    weights = (q / (temperature * q.abs().mean(1, keepdim=True))).softmax(1)
    return (weights.unsqueeze(-1) * actions).sum(1).clamp(-1, 1)
