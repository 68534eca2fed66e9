"""The agent in its environment: it acts there once before each online update, and its replay gets what it sees."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from fdkernels.policy import Acting
from fdkernels.policy.finite import check_finite
from train.agents.base import Agent
from train.data.replay import Replay
from train.data.transitions import ACTION_BOUND

ONLINE_METRICS = {
    "online_return": "mean return of the training episodes that ended since the row before",
    "online_success": "the share of them that reached the goal",
}


class Explorer:
    """An agent that plays whole training episodes, one step at a time.

    Each episode begins from a seed made of the run's seed and the episode's number. Seed and actions determine an
    episode, so a resumed run plays the one under way again up to where its checkpoint was made.

    Args:
        env_id: gymnasium environment id.
        agent: the agent, whose mean and standard deviation also standardise what it sees here.
        acting: how it chooses its actions.
        generator: source of the noise for that, on the agent's device.
        replay: gets the transitions.
        reward_std: number that the offline rewards were divided by, ().
        seed: the run's seed.
    """

    def __init__(
        self,
        env_id: str,
        agent: Agent,
        acting: Acting,
        generator: torch.Generator,
        replay: Replay,
        reward_std: Tensor,
        seed: int,
    ) -> None:
        self.env = gym.make(env_id, disable_env_checker=True)
        self.agent, self.acting, self.generator, self.replay = agent, acting, generator, replay
        self.reward_std, self.seed = reward_std, seed
        self.episodes = 0
        """Number of episodes begun."""
        self.steps = 0
        """Steps of the episode under way; 0 if none is."""
        self._ended: list[tuple[float, bool]] = []

    def step(self) -> None:
        """Act once, in a new episode if none is under way.

        Raises:
            NotFinite: the action, or what came of it, is NaN or infinite. The replay does not get it.
        """
        if self.steps == 0:
            self.episodes += 1
            self.replay.begin(self._reset())
        noise = self.acting.draw(self.agent, 1, self.generator)
        action = self.acting(self.agent, self.replay.state.unsqueeze(0), noise)[0].clamp(-ACTION_BOUND, ACTION_BOUND)
        check_finite(f"the policy's action {self._when}", action)
        state, reward, terminated, truncated = self._play(action)
        self.replay.add(action, reward, float(not terminated), state)
        if terminated or truncated:
            self._ended.append((self._return, self._success))
            self.steps = 0

    def report(self) -> dict[str, float]:
        """The `ONLINE_METRICS` of the episodes that ended since the last report; nothing if none did."""
        ended, self._ended = self._ended, []
        return dict(zip(ONLINE_METRICS, np.mean(ended, axis=0).tolist())) if ended else {}

    def _reset(self) -> Tensor:
        (seed,) = np.random.SeedSequence((self.seed, self.episodes)).generate_state(1)
        observation, _ = self.env.reset(seed=int(seed))
        self.steps, self._return, self._success = 0, 0.0, False
        state = self._standardized(observation)
        check_finite(f"the first observation of episode {self.episodes}", state.cpu())
        return state

    def _play(self, action: Tensor) -> tuple[Tensor, Tensor, bool, bool]:
        """Take the action: the state it led to, the reward as offline rewards are scaled, terminated, truncated."""
        observation, reward, terminated, truncated, info = self.env.step(action.cpu().numpy())
        state = self._standardized(observation)
        scaled = torch.tensor(float(reward), dtype=self.reward_std.dtype) / self.reward_std
        check_finite(f"the observation {self._when}", state.cpu())
        check_finite(f"the reward {self._when}", scaled.cpu())
        self.steps += 1
        self._return += float(reward)
        self._success |= bool(info.get("success", False))
        return state, scaled, bool(terminated), bool(truncated)

    @property
    def _when(self) -> str:
        return f"in step {self.steps + 1} of episode {self.episodes}"

    def _standardized(self, observation: np.ndarray) -> Tensor:
        agent = self.agent
        return (torch.from_numpy(np.asarray(observation)).to(agent.obs_mean) - agent.obs_mean) / agent.obs_std

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def notes(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the replay."""
        return {"episodes": self.episodes, "steps": self.steps, "ended": self._ended}

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str | None:
        """Go on from a checkpoint. Returns a line to print if the episode under way cannot be continued."""
        self.replay.restore(tensors)
        self.episodes = notes["episodes"]
        self._ended = [(float(total), bool(success)) for total, success in notes["ended"]]
        if notes["steps"] == 0:
            return None
        states, actions = self.replay.last(notes["steps"])
        same = torch.equal(self._reset(), states[0])
        for action, state in zip(actions, states[1:]):
            same = same and torch.equal(self._play(action)[0], state)
        if same:
            return None
        self.steps = 0
        return f"episode {self.episodes} went another way when it was played again; the next one begins now"
