"""Undiscounted returns of a policy in vectorised environments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from train.agents import Agent
from train.environments import make_vector_env


def run_episodes(env_id: str, policy: Callable[[np.ndarray], np.ndarray], *, episodes: int, seed: int) -> np.ndarray:
    """Play whole episodes side by side, each from a seed of its own.

    Args:
        env_id: gymnasium environment id.
        policy: maps observations (episodes, obs_dim) to actions (episodes, action_dim).
        episodes: how many, all stepped together.
        seed: episode i starts from ``seed + i``.

    Returns:
        The return of each episode, (episodes,) float64.
    """
    envs = make_vector_env(env_id, episodes)
    try:
        obs, _ = envs.reset(seed=seed)
        returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
        while running.any():
            obs, reward, terminated, truncated, _ = envs.step(policy(obs))
            returns += np.where(running, reward, 0.0)
            running &= ~(terminated | truncated)
    finally:
        envs.close()
    return returns


def evaluate(agent: Agent, env_id: str, *, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Returns of the policy and of the behaviour flow alone (δ = 0), from the same initial states and noise."""
    roles = {"policy": agent.act, "flow": agent.flow_action}
    return {
        role: run_episodes(env_id, _acting(agent, act, seed), episodes=episodes, seed=seed)
        for role, act in roles.items()
    }


def _acting(agent: Agent, act: Callable[[Tensor, Tensor], Tensor], seed: int) -> Callable[[np.ndarray], np.ndarray]:
    device = agent.obs_mean.device
    generator = torch.Generator(device).manual_seed(seed)

    def policy(obs: np.ndarray) -> np.ndarray:
        noise = torch.randn(len(obs), agent.action_dim, generator=generator, device=device)
        standardized = (torch.from_numpy(obs).to(device).float() - agent.obs_mean) / agent.obs_std
        return act(standardized, noise).cpu().numpy()

    return policy
