"""Soft actor-critic (Haarnoja et al., arXiv 1812.05905), sized to train the behaviour policies on one CPU core.

The policies that ship in ``train/behaviour/policies`` are snapshots of these runs. Each run was stopped soon after its
snapshot, within an hour on one core:

    python train/behaviour/sac.py --eval-every 10000 --seed 0 --out runs/sac00    # simple, after 60,000 transitions
    python train/behaviour/sac.py --seed 1 --out runs/sac1    # medium, after 150,000
    python train/behaviour/sac.py --seed 0 --out runs/sac0    # expert, after 850,000
    hopper="--env-id Hopper-v5 --simple-return 600 --medium-return 1450"
    python train/behaviour/sac.py $hopper --eval-every 10000 --seed 0 --out runs/hopper00    # simple, after 110,000
    python train/behaviour/sac.py $hopper --eval-every 10000 --seed 1 --out runs/hopper1    # medium, after 240,000
    python train/behaviour/sac.py $hopper --eval-every 25000 --seed 0 --out runs/hopper0    # expert, after 475,000
    walker="--env-id Walker2d-v5 --simple-return 800 --medium-return 2800"
    python train/behaviour/sac.py $walker --eval-every 10000 --seed 0 --out runs/walker00    # simple, after 240,000
    python train/behaviour/sac.py $walker --eval-every 25000 --seed 0 --out runs/walker0    # medium, after 575,000
    # and expert, after 700,000

*simple* and *medium* are the first snapshots that reach ``simple_return`` and ``medium_return``; *expert* is the best.
The return stored with the weights is measured on other episodes than those that chose the snapshot.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from train.agents.target import follow
from train.behaviour.policy import BehaviourPolicy
from train.evaluate import run_episodes
from train.simulator import make_vector_env


@dataclasses.dataclass
class SACConfig:
    """Every setting of the run."""

    out: Path
    """Folder for the snapshots."""
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment id."""
    seed: int = 0
    env_steps: int = 2_000_000
    """Transitions collected in all."""
    num_envs: int = 16
    """Environments stepped together."""
    updates_per_transition: float = 0.25
    """Gradient updates per collected transition."""
    random_steps: int = 10_000
    """Transitions of uniformly random actions before learning starts."""
    batch_size: int = 256
    hidden: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    """Rate at which the target critics follow the critics."""
    critic_lr: float = 1e-3
    actor_lr: float = 6e-4
    policy_delay: int = 2
    """Critic updates per actor update."""
    eval_every: int = 50_000
    """Transitions between snapshots."""
    eval_episodes: int = 20
    simple_return: float = 2_000.0
    """Return that a snapshot must reach to be called simple."""
    medium_return: float = 5_000.0
    """Return that a snapshot must reach to be called medium."""
    threads: int = 1


class Actor(nn.Module):
    """Tanh-squashed diagonal Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mean = nn.Linear(hidden, action_dim)
        self.log_std = nn.Linear(hidden, action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """An action in [-1, 1] and its log density."""
        h = self.trunk(obs)
        mean, log_std = self.mean(h), self.log_std(h).clamp(-5, 2)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not overflow
        log_prob = -0.5 * noise.square() - log_std - 0.9189385 - 2 * (0.6931472 - u - F.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)

    def behaviour_policy(self) -> BehaviourPolicy:
        weights = {name: p.detach().numpy().astype(np.float16) for name, p in self.named_parameters()}
        return BehaviourPolicy(weights)


class TwinCritic(nn.Module):
    """Two Q networks with their weights stacked, one batched matrix product per layer."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        widths = [obs_dim + action_dim, hidden, hidden, 1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = fan_in**-0.5
            self.weights.append(nn.Parameter(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(2, 1, fan_out).uniform_(-bound, bound)))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q values, shape (2, batch)."""
        h = torch.cat([obs, action], -1).expand(2, -1, -1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b, h, w)
            if i < len(self.weights) - 1:
                h = h.relu()
        return h.squeeze(-1)


class ReplayBuffer:
    """Ring buffer; a row is observation, action, reward, next observation, non-terminal mask."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int) -> None:
        self.rows = torch.empty(capacity, 2 * obs_dim + action_dim + 2)
        self.split = [obs_dim, action_dim, 1, obs_dim, 1]
        self.size = 0

    def add(self, *columns: np.ndarray) -> None:
        rows = torch.from_numpy(np.concatenate([c.reshape(len(c), -1) for c in columns], axis=1, dtype=np.float32))
        self.rows[self.size : self.size + len(rows)] = rows
        self.size += len(rows)

    def sample(self, n: int) -> tuple[Tensor, ...]:
        return self.rows[torch.randint(self.size, (n,))].split(self.split, dim=-1)


class SAC:
    def __init__(self, config: SACConfig, obs_dim: int, action_dim: int) -> None:
        self.config = config
        self.actor = Actor(obs_dim, action_dim, config.hidden)
        self.critic = TwinCritic(obs_dim, action_dim, config.hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.target_entropy = -float(action_dim)
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_alpha], config.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_lr, fused=True)
        self.updates = 0

    def update(self, batch: tuple[Tensor, ...]) -> None:
        obs, action, reward, next_obs, mask = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, log_prob = self.actor(next_obs)
            next_q = self.target(next_obs, next_action).amin(0) - alpha * log_prob
            target_q = reward.squeeze(-1) + self.config.gamma * mask.squeeze(-1) * next_q
        critic_loss = (self.critic(obs, action) - target_q).square().mean(-1).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        self.updates += 1
        if self.updates % self.config.policy_delay == 0:
            self.critic.requires_grad_(False)
            policy_action, log_prob = self.actor(obs)
            q = self.critic(obs, policy_action).amin(0)
            entropy_gap = (log_prob.detach() + self.target_entropy).mean()
            loss = (alpha * log_prob - q).mean() - self.log_alpha * entropy_gap
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            self.critic.requires_grad_(True)
        follow(self.target, self.critic, self.config.tau)


def transitions(envs: gym.vector.VectorEnv, agent: SAC) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless batches of ``num_envs`` transitions of the current policy (random ones first)."""
    obs, _ = envs.reset(seed=agent.config.seed)
    for step in range(0, agent.config.env_steps, agent.config.num_envs):
        if step < agent.config.random_steps:
            action = envs.action_space.sample()
        else:
            with torch.no_grad():
                action = agent.actor(torch.from_numpy(obs).float())[0].numpy()
        next_obs, reward, terminated, truncated, info = envs.step(action)
        reached = next_obs
        if (terminated | truncated).any():
            reached = np.stack([last if last is not None else o for last, o in zip(info["final_obs"], next_obs)])
        yield obs, action, reward, reached, 1.0 - terminated
        obs = next_obs


def main(config: SACConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    envs = make_vector_env(config.env_id, config.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.action_space.seed(config.seed)
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape or (), envs.single_action_space.shape or ()
    agent = SAC(config, obs_dim, action_dim)
    buffer = ReplayBuffer(config.env_steps + config.num_envs, obs_dim, action_dim)

    wanted = {"simple": config.simple_return, "medium": config.medium_return, "expert": -np.inf}
    started, owed = time.time(), 0.0
    next_eval = config.eval_every
    for rows in transitions(envs, agent):
        buffer.add(*rows)
        if buffer.size < config.random_steps:
            continue
        owed += config.num_envs * config.updates_per_transition
        while owed >= 1:
            agent.update(buffer.sample(config.batch_size))
            owed -= 1
        if buffer.size < next_eval:
            continue
        next_eval += config.eval_every
        policy = agent.actor.behaviour_policy()
        returns = play(policy, config, seed=buffer.size)
        mean, minutes = returns.mean(), (time.time() - started) / 60
        print(f"{buffer.size:>9,} transitions  {minutes:5.1f} min  return {mean:7.0f}", flush=True)
        family = config.env_id.split("-")[0].lower()
        for level, least in list(wanted.items()):
            if not mean >= least:  # also skips NaN
                continue
            trained = {"transitions": str(buffer.size), "updates": str(agent.updates), "seed": str(config.seed)}
            note = trained | measure(policy, config)
            policy.save(config.out / f"{family}-{level}.safetensors", note)
            wanted[level] = mean if level == "expert" else np.inf  # expert: the best; others: the first


def play(policy: BehaviourPolicy, config: SACConfig, seed: int) -> np.ndarray:
    act = functools.partial(policy, rng=np.random.default_rng(seed))
    return run_episodes(config.env_id, act, episodes=config.eval_episodes, seed=1_000_000 + seed).returns


def measure(policy: BehaviourPolicy, config: SACConfig) -> dict[str, str]:
    """Return over fresh episodes, in the form stored with the weights."""
    returns = play(policy, config, seed=0)
    return {
        "env_id": config.env_id,
        "return_mean": f"{returns.mean():.1f}",
        "return_sem": f"{returns.std(ddof=1) / len(returns) ** 0.5:.1f}",
        "episodes": str(config.eval_episodes),
    }


if __name__ == "__main__":
    main(tyro.cli(SACConfig, description=__doc__))
