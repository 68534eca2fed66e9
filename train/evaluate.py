"""Returns and successes of a policy in vectorised environments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fdkernels.policy import Acting, Policy
from fdkernels.policy.finite import check_finite
from train.agents.base import Agent
from train.data.episode import Outcomes
from train.simulator import kept_vector_env

ROLES = ("policy", "sample", "flow")
"""The policy under the run's acting rule; one sample of the policy; the behaviour flow alone (δ = 0)."""


def run_episodes(env_id: str, policy: Callable[[np.ndarray], np.ndarray], *, episodes: int, seed: int) -> Outcomes:
    """Play whole episodes side by side, each from its own seed.

    Args:
        env_id: gymnasium environment id.
        policy: maps observations (episodes, ...) to actions (episodes, action_dim).
        episodes: number of episodes, all stepped together.
        seed: episode i starts from ``seed + i``.

    Raises:
        NotFinite: an observation or a reward is NaN or infinite.
    """
    envs = kept_vector_env(env_id, episodes)
    obs, _ = envs.reset(seed=seed)
    check_finite(f"the first observation of {env_id}", obs)
    returns, successes, running = np.zeros(episodes), np.zeros(episodes, bool), np.ones(episodes, bool)
    steps = 0
    while running.any():
        obs, reward, terminated, truncated, info = envs.step(policy(obs))
        steps += 1
        check_finite(f"the observation of {env_id} after {steps} steps", obs)
        check_finite(f"the reward of {env_id} after {steps} steps", np.where(running, reward, 0.0))
        returns += np.where(running, reward, 0.0)
        successes |= running & np.asarray(info.get("success", successes), bool)
        running &= ~(terminated | truncated)
    return Outcomes(returns, successes)


def evaluate(agent: Agent, env_id: str, acting: Acting, *, episodes: int, seed: int) -> dict[str, Outcomes]:
    """What each of the `ROLES` achieves from the same initial states; the last two also share their noise."""

    def play(acting: Acting) -> Outcomes:
        # a new policy each time, because it remembers frames and draws its noise on from call to call
        return run_episodes(env_id, Policy(agent, acting, seed=seed), episodes=episodes, seed=seed)

    of_sample = play(Acting("sample"))
    of_policy = of_sample if acting.rule == "sample" else play(acting)
    return {"policy": of_policy, "sample": of_sample, "flow": play(Acting("flow"))}
