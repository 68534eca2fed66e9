"""Offline reinforcement learning in one file: a flow, twin critics, and a displacement inside a trust region.

    python examples/corl.py
    python examples/corl.py --data yours.npz --penalty fisher --save agent.pt

In the style of CORL: everything between the data and the score is in this file, except the operators. Without data of
yours it drives round a corridor, with each penalty. An .npz holds observations, actions in [-1, 1], rewards,
next_observations and terminals, as D4RL has them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fdkernels

PENALTIES = ("isotropic", "fisher", "pullback")


@dataclasses.dataclass
class Config:
    penalty: str = "fisher"
    """One of PENALTIES, which measures the displacement δ. All three are mean squares, so that alpha means the same."""
    alpha: float = 1.0
    """Weight of the penalty, beside a Q that is divided by its mean size."""
    gamma: float = 0.98
    tau: float = 0.01
    """Share by which the target critics follow."""
    batch: int = 128
    lr: float = 1e-3
    flow_lr: float = 2e-3
    width: int = 64
    flow_updates: int = 3_000
    """Of the flow alone, first."""
    updates: int = 1_000
    """Of critics and displacement."""
    flow_steps: int = 5


class Batch(NamedTuple):
    """Transitions: observations (n, c), actions (n, d), rewards (n,), next observations, 1 where an episode ended."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminal: Tensor

    def sample(self, count: int) -> Batch:
        rows = torch.randint(len(self.obs), (count,))
        return Batch(*(column[rows] for column in self))


def mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


class Agent(nn.Module):
    """π(s) = clip(a + δ(s, a)) with a an action of the behaviour flow."""

    def __init__(self, obs_dim: int, action_dim: int, config: Config) -> None:
        super().__init__()
        self.config, self.action_dim = config, action_dim
        self.flow = fdkernels.VelocityMLP(obs_dim, action_dim, hidden=(config.width,) * 3, activation="silu")
        self.critics = nn.ModuleList(mlp(obs_dim + action_dim, 1, config.width) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.delta = mlp(obs_dim + action_dim, action_dim, config.width)
        nn.init.zeros_(self.delta[-1].weight)
        nn.init.zeros_(self.delta[-1].bias)

    def behave(self, obs: Tensor) -> Tensor:
        """Actions of the behaviour flow; no gradient."""
        noise = torch.randn(*obs.shape[:-1], self.action_dim)
        return fdkernels.integrate_flow(self.flow, noise, obs, num_steps=self.config.flow_steps)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        action = self.behave(obs)
        return (action + self.delta(torch.cat([obs, action], -1))).clamp(-1, 1)

    def q(self, critics: nn.ModuleList, obs: Tensor, action: Tensor) -> Tensor:
        """(2, n)."""
        return torch.stack([critic(torch.cat([obs, action], -1)).squeeze(-1) for critic in critics])

    def flow_loss(self, batch: Batch) -> Tensor:
        noise, t = torch.randn_like(batch.action), torch.rand(len(batch.action), 1)
        x_t = (1 - t) * noise + t * batch.action
        return F.mse_loss(self.flow(x_t, t, batch.obs), batch.action - noise)

    def critic_loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            next_q = self.q(self.targets, batch.next_obs, self.act(batch.next_obs)).amin(0)
            target = batch.reward + self.config.gamma * (1 - batch.terminal) * next_q
        return F.mse_loss(self.q(self.critics, batch.obs, batch.action), target.expand(2, -1))

    def actor_loss(self, obs: Tensor) -> Tensor:
        action = self.behave(obs)
        delta = self.delta(torch.cat([obs, action], -1))
        q = self.q(self.critics, obs, (action + delta).clamp(-1, 1)).mean(0)
        return (self.config.alpha * self.penalty(obs, action, delta) - q / q.detach().abs().mean()).mean()

    def penalty(self, obs: Tensor, action: Tensor, delta: Tensor) -> Tensor:
        """The size of δ, (n,)."""
        if self.config.penalty == "fisher":
            return fdkernels.flow_fisher_penalty(self.flow, obs, delta, t=0.9, num_steps=self.config.flow_steps)
        if self.config.penalty == "pullback":
            return fdkernels.flow_pullback_penalty(self.flow, obs, action, delta)
        return delta.square().mean(-1)


class Corridor:
    """A point drives round a ring-shaped corridor, as far as it can in 60 steps; hitting a wall ends the episode.

    It observes the direction from the centre (2) and its distance from the middle of the corridor, in half widths. The
    drivers of the data vary a lot in speed and little in direction: they steer back to the middle.
    """

    obs_dim, action_dim, horizon = 3, 2, 60
    half_width, stride = 0.15, 0.1

    def observe(self, position: Tensor) -> Tensor:
        radius = position.norm(dim=-1, keepdim=True)
        return torch.cat([position / radius, (radius - 1) / self.half_width], -1)

    def reset(self, count: int) -> Tensor:
        angle, radius = 2 * math.pi * torch.rand(count), 1 + 0.05 * torch.randn(count)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def step(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next position, the reward (the angle driven, times ten) and whether a wall was hit."""
        after = position + self.stride * action
        turned = torch.atan2(position[:, 0] * after[:, 1] - position[:, 1] * after[:, 0], (position * after).sum(-1))
        hit = self.observe(after)[:, 2].abs() > 1
        return after, 10 * turned, hit.float()

    def drive(self, obs: Tensor) -> Tensor:
        """Actions of the data's drivers."""
        outward, offset = obs.split([2, 1], -1)
        along = torch.stack([-outward[:, 1], outward[:, 0]], -1)
        speed = 0.4 + 0.25 * torch.randn_like(offset)
        steer = -0.3 * offset - 0.2 * speed + 0.06 * torch.randn_like(offset)
        return (speed * along + steer * outward).clamp(-1, 1)

    def rollouts(self, act: Callable[[Tensor], Tensor], count: int) -> tuple[Batch, Tensor, Tensor]:
        """Transitions of episodes side by side, their returns and whether they hit a wall, (count,) each."""
        position, alive, returns, steps = self.reset(count), torch.ones(count), torch.zeros(count), []
        for _ in range(self.horizon):
            obs, driving = self.observe(position), alive.bool()
            action = act(obs)
            after, reward, hit = self.step(position, action)
            steps.append(Batch(*(column[driving] for column in (obs, action, reward, self.observe(after), hit))))
            returns += alive * reward
            alive = alive * (1 - hit)
            position = after
        return Batch(*map(torch.cat, zip(*steps))), returns, 1 - alive


def load(path: Path) -> Batch:
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    with np.load(path) as file:
        if missing := [name for name in names if name not in file]:
            raise SystemExit(f"{path}: lacks {', '.join(missing)}")
        return Batch(*(torch.from_numpy(file[name].astype(np.float32)) for name in names))


def adam(weights: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(weights, lr, fused=True)


def train_flow(agent: Agent, data: Batch) -> None:
    config, optimizer = agent.config, adam(agent.flow.parameters(), agent.config.flow_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.flow_updates)
    for _ in range(config.flow_updates):
        optimizer.zero_grad()
        agent.flow_loss(data.sample(config.batch)).backward()
        optimizer.step()
        schedule.step()
    agent.flow.requires_grad_(False)


def train(agent: Agent, data: Batch) -> None:
    """Critics and displacement."""
    config = agent.config
    critic_optimizer = adam(agent.critics.parameters(), config.lr)
    actor_optimizer = adam(agent.delta.parameters(), config.lr)
    for _ in range(config.updates):
        batch = data.sample(config.batch)
        critic_optimizer.zero_grad()
        agent.critic_loss(batch).backward()
        critic_optimizer.step()
        actor_optimizer.zero_grad()
        agent.actor_loss(batch.obs).backward()
        actor_optimizer.step()
        with torch.no_grad():
            for target, weight in zip(agent.targets.parameters(), agent.critics.parameters()):
                target.lerp_(weight, config.tau)


def show(title: str, scores: list[tuple[float, float]]) -> None:
    """Mean (lowest to highest) over seeds."""
    returns, hits = zip(*scores)
    print(
        f"| {title} | {sum(returns) / len(returns):.1f} ({min(returns):.1f} to {max(returns):.1f}) "
        f"| {sum(hits) / len(hits):.2f} ({min(hits):.2f} to {max(hits):.2f}) |",
        flush=True,
    )


def corridor(config: Config, seeds: int) -> None:
    """Train with each penalty and several seeds, and print a table."""
    world, began = Corridor(), time.perf_counter()
    scores: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        data, returns, hit = world.rollouts(world.drive, 200)
        scores.setdefault("drivers of the data", []).append((returns.mean().item(), hit.mean().item()))
        cloned = Agent(world.obs_dim, world.action_dim, config)
        train_flow(cloned, data)
        for penalty in ("behaviour flow", *PENALTIES):
            torch.manual_seed(seed)
            agent = copy.deepcopy(cloned)
            if penalty in PENALTIES:
                agent.config = dataclasses.replace(config, penalty=penalty)
                train(agent, data)
            _, returns, hit = world.rollouts(agent.act, 512)
            scores.setdefault(penalty, []).append((returns.mean().item(), hit.mean().item()))
    print(f"| alpha {config.alpha} | return | hit a wall |\n| --- | --- | --- |")
    for title, values in scores.items():
        show(title, values)
    print(f"{seeds} {'seed' if seeds == 1 else 'seeds'} in {time.perf_counter() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz of transitions")
    parser.add_argument("--save", type=Path, default=Path("agent.pt"), help="where the weights go, with --data")
    parser.add_argument("--penalty", choices=PENALTIES, default=Config.penalty, help="with --data")
    parser.add_argument("--alpha", type=float, default=Config.alpha)
    parser.add_argument("--seeds", type=int, default=2, help="without --data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(penalty=given.penalty, alpha=given.alpha)
    if given.data is None:
        return corridor(config, given.seeds)
    data = load(given.data)
    agent = Agent(data.obs.shape[1], data.action.shape[1], config)
    train_flow(agent, data)
    train(agent, data)
    torch.save(agent.state_dict(), given.save)
    print(f"{config}\n{len(data.obs):,} transitions; wrote {given.save}")


if __name__ == "__main__":
    main()
