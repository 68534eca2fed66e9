"""Problems whose answer is known, so that an example can say what its penalty cost: thin Gaussians, a linear reward.

States are angles. The behaviour's actions are Gaussian, wide in some directions and thin in others. The reward is
linear, r(s, a) = g·a. A policy that pays KL(π ‖ behaviour) = κ on average can then gain √(2κ·E[gᵀΣg]) at most, by
moving each state's density by a multiple of Σg; what a policy gains, as a share of that, needs no choice of a budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from benchmarks.evidence.densities import Gaussian, observe

Policy = Callable[[Tensor, Tensor], Tensor]
"""Maps noise (n, d) and observations (n, 2) to actions (n, d)."""


class Problem(NamedTuple):
    behaviour: Gaussian
    g: Tensor
    """(d,)."""


TURNING = Problem(
    Gaussian("two thin Gaussians", ((0.25, 0.05), (0.2, 0.05)), turns=(1, -1), centre=0.3), torch.full((4,), 0.5)
)
OBS = 2
ACTIONS = 256  # for each state, of the judge


class Verdict(NamedTuple):
    gain: float
    """Reward above the behaviour's."""
    kl: float
    """KL(π ‖ behaviour) in nats, with π a Gaussian of the policy's mean and covariance in each state."""
    added: float
    """The same without what the flow itself pays, because it is not the behaviour exactly."""
    share: float
    """The gain, as a share of what the best policy gains for a KL of ``added``."""


def offline_data(count: int, problem: Problem = TURNING, noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (n, 2), actions (n, d) and noisy rewards (n,) of the behaviour."""
    angle = 2 * math.pi * torch.rand(count)
    action = problem.behaviour.sample(angle)
    return observe(angle), action, action @ problem.g + noise * torch.randn(count)


@torch.no_grad()
def judge(policy: Policy, flow: Verdict | None = None, problem: Problem = TURNING, states: int = 256) -> Verdict:
    """What a policy gains and pays, beyond the flow that it refines."""
    angle = 2 * math.pi * torch.arange(states, dtype=torch.float64) / states
    obs = observe(angle.float()).repeat_interleave(ACTIONS, 0)
    density, g = problem.behaviour, problem.g.double()
    actions = policy(torch.randn(len(obs), density.d), obs).double().unflatten(0, (states, ACTIONS))
    mean, covariance = density.parts(angle)[0], density.covariance(angle)
    moved = actions.mean(1)
    centred = actions - moved.unsqueeze(1)
    behaviour = MultivariateNormal(mean, covariance)
    kl = kl_divergence(MultivariateNormal(moved, centred.mT @ centred / (ACTIONS - 1)), behaviour).mean().item()
    gain, best = ((moved - mean) @ g).mean().item(), (covariance @ g @ g).mean().item()
    if flow is None:
        return Verdict(gain, kl, math.nan, math.nan)
    gain, added = gain - flow.gain, kl - flow.kl
    return Verdict(gain, kl, added, gain / math.sqrt(2 * added * best) if added > 0 else math.nan)


def compare(experiment: Callable[[int], Mapping[str, NamedTuple]], seeds: int) -> None:
    """Run an experiment with several seeds, and print the mean of each figure with the lowest and the highest.

    Args:
        experiment: the figures of every contestant for a seed.
        seeds: how many.
    """
    began = time.perf_counter()
    runs = [experiment(seed) for seed in range(seeds)]
    print(f"|  | {' | '.join(next(iter(runs[0].values()))._fields)} |")
    print(f"| --- |{' --- |' * len(next(iter(runs[0].values())))}")
    for contestant in runs[0]:
        print(f"| {contestant} | {' | '.join(map(cell, zip(*(run[contestant] for run in runs))))} |")
    print(f"{seeds} {'seed' if seeds == 1 else 'seeds'} in {time.perf_counter() - began:.0f} s")


def cell(values: Sequence[float]) -> str:
    """Mean (lowest to highest)."""
    if any(map(math.isnan, values)):
        return "–"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
