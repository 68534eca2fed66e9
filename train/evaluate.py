"""Undiscounted returns of a policy in vectorised environments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train.environments import make_vector_env


def run_episodes(
    env_id: str, policy: Callable[[np.ndarray], np.ndarray], *, episodes: int, seed: int
) -> np.ndarray:
    """Play ``episodes`` whole episodes at once, each from a seed of its own.

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
