"""Fine-tune a flow policy online as ReinFlow does, with its behaviour cloning loss measured by the Fisher metric.

    python -m examples.reinflow

ReinFlow (arXiv 2505.22094) integrates in a few steps of length 1/K, evaluates the velocity at linspace(0, 1, K), so at
t = 1 too, and clips after each step. To explore, it injects noise into every step and improves the noisy chain by PPO.
docs/examples/reinflow.md has the diff.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import fdkernels
from examples.closed_form import OBS, TURNING, Verdict, compare, judge, offline_data

ACT = TURNING.behaviour.d
PENALTIES = ("square", "fisher", "pullback")


@dataclasses.dataclass
class Config:
    penalty: str = "fisher"
    """Of the behaviour cloning loss: square, as ReinFlow has it, fisher or pullback."""
    bc_coef: float = 60.0
    """Its weight, which means the same for all three."""
    steps: int = 4
    """K."""
    width: int = 64
    batch: int = 256
    lr: float = 1e-3
    flow_updates: int = 4_000
    iterations: int = 60
    epochs: int = 4
    clip: float = 0.1
    """Of PPO's ratio."""
    std: tuple[float, float] = (0.03, 0.1)
    """Bounds of the injected noise."""


class FlowMLP(nn.Module):
    """v(action, time, obs) with a sinusoidal embedding of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))
        widths = [OBS + ACT + 8, width, width, width]
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Mish())]
        self.net = nn.Sequential(*layers, nn.Linear(width, ACT))

    def forward(self, action: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        phase = time * self.frequencies
        return self.net(torch.cat([obs, action, phase.sin(), phase.cos()], -1))


class Chains(NamedTuple):
    """What was tried: observations (n, OBS), the states of the chains (K + 1, n, ACT), log-densities and advantages."""

    obs: Tensor
    states: Tensor
    log_prob: Tensor
    advantage: Tensor
    reward: Tensor


class ReinFlow(nn.Module):
    """The flow being fine-tuned, its noise and its value function, beside the frozen flow that it began as."""

    def __init__(self, flow: FlowMLP, config: Config) -> None:
        super().__init__()
        self.flow, self.config = flow, config
        self.behaviour = copy.deepcopy(flow).requires_grad_(False)
        self.noise = nn.Sequential(nn.Linear(OBS + 1, 32), nn.Mish(), nn.Linear(32, ACT))
        self.value = nn.Sequential(nn.Linear(OBS, 32), nn.Mish(), nn.Linear(32, 1))

    def act(self, flow: FlowMLP, start: Tensor, obs: Tensor, differentiable: bool = False) -> Tensor:
        """Integrate without noise: K steps of 1/K, the times linspace(0, 1, K), clipped each time."""
        stretch = self.config.steps / (self.config.steps - 1)  # the solver's times 0, 1/K ... 1 - 1/K become 0 ... 1
        return fdkernels.integrate_flow(
            lambda x, t, obs: flow(x, stretch * t, obs),
            start,
            obs,
            num_steps=self.config.steps,
            clip_each_step=True,
            differentiable=differentiable,
        )

    def step(self, state: Tensor, i: int, obs: Tensor) -> Normal:
        """The next state's distribution."""
        time = torch.full_like(state[..., :1], i / (self.config.steps - 1))
        low, high = self.config.std
        std = low + (high - low) * self.noise(torch.cat([obs, time], -1)).sigmoid()
        return Normal((state + self.flow(state, time, obs) / self.config.steps).clamp(-1, 1), std)

    @torch.no_grad()
    def explore(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Chains (K + 1, n, ACT), of which the last state is the action, and their log-densities (n,)."""
        states, log_prob = [torch.randn(len(obs), ACT)], torch.zeros(len(obs))
        for i in range(self.config.steps):
            step = self.step(states[-1], i, obs)
            state = step.sample()
            states.append(state.clamp(-1, 1) if i == self.config.steps - 1 else state)
            log_prob += step.log_prob(states[-1]).sum(-1)
        return torch.stack(states), log_prob

    def forward(self, chains: Chains) -> Tensor:
        """PPO's loss of the chains, the value's and the behaviour cloning loss."""
        steps = [self.step(chains.states[i], i, chains.obs) for i in range(self.config.steps)]
        log_prob = sum(step.log_prob(after).sum(-1) for step, after in zip(steps, chains.states[1:]))
        ratio = (log_prob - chains.log_prob).exp()
        bounded = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        ppo = -torch.minimum(ratio * chains.advantage, bounded * chains.advantage).mean()
        value = F.mse_loss(self.value(chains.obs).squeeze(-1), chains.reward)
        return ppo + value + self.config.bc_coef * self.bc_loss(chains.obs)

    def bc_loss(self, obs: Tensor) -> Tensor:
        """How far the actions have moved from the behaviour's, from the same start."""
        start = torch.randn(len(obs), ACT)
        old, new = self.act(self.behaviour, start, obs), self.act(self.flow, start, obs, differentiable=True)
        if self.config.penalty == "fisher":
            samples = self.act(self.behaviour, torch.randn(len(obs), 4, ACT), obs.unsqueeze(1))
            return fdkernels.flow_fisher_penalty(
                self.behaviour, obs, new - old, samples=samples, t=0.9, reduction="mean"
            )
        if self.config.penalty == "pullback":
            return fdkernels.flow_pullback_penalty(self.behaviour, obs, old, new - old, reduction="mean")
        return F.mse_loss(new, old)


def pretrain(config: Config) -> FlowMLP:
    """Flow matching on the behaviour's actions."""
    flow, (obs, action, _) = FlowMLP(config.width), offline_data(20_000)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.flow_updates)
    for _ in range(config.flow_updates):
        rows = torch.randint(len(obs), (config.batch,))
        noise, time = torch.randn(config.batch, ACT), torch.rand(config.batch, 1)
        x_t = (1 - time) * noise + time * action[rows]
        loss = F.mse_loss(flow(x_t, time, obs[rows]), action[rows] - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow


def collect(agent: ReinFlow, count: int) -> Chains:
    """Try out as many noisy actions, in episodes of one step."""
    obs, _, _ = offline_data(count)
    states, log_prob = agent.explore(obs)
    reward = states[-1] @ TURNING.g
    with torch.no_grad():
        advantage = reward - agent.value(obs).squeeze(-1)
    return Chains(obs, states, log_prob, (advantage - advantage.mean()) / advantage.std(), reward)


def finetune(agent: ReinFlow) -> None:
    config = agent.config
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], config.lr, fused=True)
    for _ in range(config.iterations):
        chains = collect(agent, config.batch)
        for _ in range(config.epochs):
            optimizer.zero_grad()
            agent(chains).backward()
            optimizer.step()


def experiment(seed: int, config: Config) -> dict[str, Verdict]:
    """How far each penalty lets the same flow go."""
    torch.manual_seed(seed)
    pretrained = pretrain(config)
    verdicts = {"flow": judge(partial(ReinFlow(pretrained, config).act, pretrained))}
    for penalty in PENALTIES:
        torch.manual_seed(seed)
        agent = ReinFlow(copy.deepcopy(pretrained), dataclasses.replace(config, penalty=penalty))
        finetune(agent)
        verdicts[penalty] = judge(partial(agent.act, agent.flow), verdicts["flow"])
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bc-coef", type=float, default=Config.bc_coef)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    compare(lambda seed: experiment(seed, Config(bc_coef=given.bc_coef)), given.seeds)
