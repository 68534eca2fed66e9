"""How a trained policy acts: how many actions it draws, which of them it takes, and whether it refines them.

Every rule maps observations (B, c) from `FlowPolicy.observe` and N(0, I) noise (B, N, d), N at least one, to actions
(B, d) within [-1, 1]. The first three are FiDec's published rules (arXiv 2604.17919), with N = 10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fdkernels.policy.finite import check_finite
from fdkernels.policy.network import FlowPolicy
from fdkernels.validation import check_at_least, check_choice, check_count

RuleName = Literal[
    "sample",
    "best-of-n",
    "iterated",
    "best-flow-of-n",
    "best-refined-of-n",
    "mean-flow-of-n",
    "mean-refined-of-n",
    "flow",
]

REFINEMENTS = 5
MOST_SAMPLES = 10_000
"""The largest N: the critics' hidden layers take 2 kB for each sample of each state."""


@dataclasses.dataclass(frozen=True)
class Acting:
    """A rule with its settings. Call it with (policy, observations, noise).

    Raises:
        TypeError, ValueError: a setting has the wrong type, or is out of its range.
        NotFinite: from a call that chooses among actions: one of them, or its mean Q, is NaN or infinite. Nothing is
            checked where the call is compiled or exported.
    """

    rule: RuleName = "sample"
    num_samples: int = 10
    """N, the actions drawn per state."""
    temperature: float = 0.004
    """Softmax temperature of the weighted means, as a share of mean |Q|."""

    def __post_init__(self) -> None:
        check_choice("Acting", "rule", self.rule, RULES)
        check_count("Acting", "num_samples", self.num_samples, most=MOST_SAMPLES)
        check_at_least("Acting", "temperature", self.temperature, 0.0, exclusive=True)

    def __str__(self) -> str:
        return self.rule.replace("-n", f"-{self.num_samples}")

    @property
    def draws(self) -> int:
        """The number of noise vectors that the rule takes for each state: N, or 1."""
        return self.num_samples if self.rule.endswith("-n") else 1

    def draw(self, policy: FlowPolicy, rows: int, generator: torch.Generator) -> Tensor:
        """Noise for ``rows`` states, (rows, N, d)."""
        device, dtype = policy.obs_mean.device, policy.obs_mean.dtype
        return torch.randn(rows, self.draws, policy.action_dim, generator=generator, device=device, dtype=dtype)

    def __call__(self, policy: FlowPolicy, obs: Tensor, noise: Tensor) -> Tensor:
        return RULES[self.rule](policy, obs, noise, self.temperature)


def flow_alone(policy: FlowPolicy, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """One action of the behaviour flow, without its displacement (δ = 0): behaviour cloning."""
    return policy.flow_action(obs, noise[:, 0])


def sample(policy: FlowPolicy, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """One action of the policy."""
    return policy.act(obs, noise[:, 0])


def best_of_n(policy: FlowPolicy, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Draw N flow actions, take the one with the highest mean Q, and refine it once."""
    return policy.refine(obs, best_flow_of_n(policy, obs, noise, temperature))


def iterated(policy: FlowPolicy, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Refine one flow action five times; of these six actions, take the one with the highest mean Q."""
    iterates = [flow_alone(policy, obs, noise, temperature)]
    for _ in range(REFINEMENTS):
        iterates.append(policy.refine(obs, iterates[-1]))
    return highest_q(policy, obs, torch.stack(iterates, dim=1))


def best_flow_of_n(policy: FlowPolicy, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """The flow action with the highest mean Q of N, not refined."""
    return highest_q(policy, obs, policy.flow_action(repeated(obs, noise), noise))


def best_refined_of_n(policy: FlowPolicy, obs: Tensor, noise: Tensor, _: float) -> Tensor:
    """The policy's action with the highest mean Q of N."""
    return highest_q(policy, obs, policy.act(repeated(obs, noise), noise))


def mean_flow_of_n(policy: FlowPolicy, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The `weighted_mean` of N flow actions."""
    return weighted_mean(policy, obs, policy.flow_action(repeated(obs, noise), noise), temperature)


def mean_refined_of_n(policy: FlowPolicy, obs: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The `weighted_mean` of N of the policy's actions."""
    return weighted_mean(policy, obs, policy.act(repeated(obs, noise), noise), temperature)


RULES: dict[RuleName, Callable[[FlowPolicy, Tensor, Tensor, float], Tensor]] = {
    "sample": sample,
    "best-of-n": best_of_n,
    "iterated": iterated,
    "best-flow-of-n": best_flow_of_n,
    "best-refined-of-n": best_refined_of_n,
    "mean-flow-of-n": mean_flow_of_n,
    "mean-refined-of-n": mean_refined_of_n,
    "flow": flow_alone,
}
REFINING_RULES: tuple[RuleName, ...] = ("best-of-n", "iterated")
"""Rules that call `FlowPolicy.refine`."""


def repeated(obs: Tensor, rows: Tensor) -> Tensor:
    """Each state's observation, repeated for each of its N noise vectors or actions (B, N, d): (B, N, c)."""
    return obs.unsqueeze(1).expand(-1, rows.shape[1], -1)


def mean_q(policy: FlowPolicy, obs: Tensor, actions: Tensor) -> Tensor:
    """Mean of both critics' Q for each state's actions (B, N, d): (B, N)."""
    qs = policy.critic(repeated(policy.view("critic", obs), actions).flatten(0, 1), actions.flatten(0, 1))
    q = qs.mean(0).view(actions.shape[:2])
    if not is_compiling():  # argmax would choose a NaN
        check_finite("the policy's action", actions)
        check_finite("the critics' mean Q of states and actions", q)
    return q


@torch.no_grad()
def highest_q(policy: FlowPolicy, obs: Tensor, actions: Tensor) -> Tensor:
    """For each state, the action with the highest `mean_q` among (B, N, d): (B, d)."""
    best = mean_q(policy, obs, actions).argmax(1)
    return actions.gather(1, best[:, None, None].expand(-1, 1, actions.shape[2])).squeeze(1)


@torch.no_grad()
def weighted_mean(policy: FlowPolicy, obs: Tensor, actions: Tensor, temperature: float) -> Tensor:
    """The mean of each state's actions (B, N, d), weighted by exp(Q / (temperature · mean |Q|)): (B, d).

    Path-integral control weights its samples in the same way (MPPI, arXiv 1509.01149). The weights choose between
    modes of the data that differ in value, and average within a mode. An average is less extreme than the best of many
    actions, which exploits the critic's errors.
    """
    q = mean_q(policy, obs, actions)
    scale = temperature * q.abs().mean(1, keepdim=True)
    weights = (q / scale.clamp(min=torch.finfo(q.dtype).tiny)).softmax(1)  # equal ones where every Q is 0
    return (weights.unsqueeze(-1) * actions).sum(1).clamp(-1, 1)
