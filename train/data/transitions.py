"""Transitions in memory, from whole episodes to random batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data.episode import Episode, Outcomes, outcomes_of

ACTION_BOUND = 1 - 1e-5
"""Actions are clipped to ± this, as usual with D4RL's data, because a tanh policy cannot reach ±1."""


class Batch(NamedTuple):
    """B transitions, with the columns of ``OfflineDataset``."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    masks: Tensor
    next_actions: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class OfflineDataset:
    """N transitions in float32.

    An episode of T steps gives T transitions (o_i, a_i, r_i, o_{i+1}):

        observations   o_0   o_1   o_2   ...   o_{T-1}   o_T
        actions           a_0   a_1   a_2   ...    a_{T-1}

    The next observation never comes from the following episode, because o_T is stored. If a time limit ended the
    episode, the mask stays 1, because the value of o_T still counts.
    """

    observations: Tensor
    """(N, obs_dim)"""
    actions: Tensor
    """(N, action_dim), within ±``ACTION_BOUND``"""
    rewards: Tensor
    """(N,)"""
    next_observations: Tensor
    """(N, obs_dim)"""
    masks: Tensor
    """(N,): 0 where the environment terminated or the goal was reached, else 1"""
    next_actions: Tensor
    """(N, action_dim), the data's next action; at the end of an episode its last action, since none follows"""
    outcomes: Outcomes = dataclasses.field(default_factory=lambda: outcomes_of(()))
    """What the episodes came to"""
    episode_lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    """(episodes,), transitions in each episode"""
    dataset_ids: tuple[str, ...] = ()
    """Minari ids."""
    source: tuple[str, ...] = ()
    """Lines to display: which data this is and where it came from."""

    @classmethod
    def from_episodes(
        cls, episodes: Sequence[Episode], dataset_ids: tuple[str, ...] = (), source: tuple[str, ...] = ()
    ) -> OfflineDataset:
        """Concatenate the transitions of whole episodes, each with one more observation than actions."""

        def column(parts: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts, dtype=np.float32))

        def actions(parts: list[np.ndarray]) -> Tensor:
            return column(parts).clamp_(-ACTION_BOUND, ACTION_BOUND)

        return cls(
            observations=column([e.observations[:-1] for e in episodes]),
            actions=actions([e.actions for e in episodes]),
            next_actions=actions([np.concatenate([e.actions[1:], e.actions[-1:]]) for e in episodes]),
            rewards=column([e.rewards for e in episodes]),
            next_observations=column([e.observations[1:] for e in episodes]),
            masks=column([e.masks for e in episodes]),
            outcomes=outcomes_of(episodes),
            episode_lengths=np.array([len(e.rewards) for e in episodes]),
            dataset_ids=dataset_ids,
            source=source,
        )

    def n_step(self, n: int, discount: float) -> OfflineDataset:
        """Transitions over up to ``n`` steps of an episode, so that r + γ·m·Q(s', a') is their n-step target.

        Rewards become Σ γ^i r_i. The next observation and action are those after the last of these steps. Masks become
        γ^(steps − 1) or 0, so that γ·m weighs the value that follows (Sutton and Barto, chapter 7). There are fewer
        steps where a mask is 0 or the episode ends before.
        """
        last = np.cumsum(self.episode_lengths) - 1
        if len(self) != (last[-1] + 1 if len(last) else 0):
            raise ValueError(
                f"n_step: episode_lengths must add up to {len(self)} transitions, got {self.episode_lengths.sum()}"
            )
        start = np.arange(len(self))
        stops = np.union1d(last, np.flatnonzero(self.masks.cpu().numpy() == 0))
        end = np.minimum(start + n - 1, stops[np.searchsorted(stops, start)])
        rewards, device = torch.zeros_like(self.rewards), self.rewards.device
        for i in range(n):
            at = np.minimum(start + i, end)
            rewards += torch.where(torch.from_numpy(start + i <= end).to(device), discount**i * self.rewards[at], 0.0)
        weights = torch.from_numpy(discount ** (end - start)).to(self.masks)
        return dataclasses.replace(
            self,
            rewards=rewards,
            next_observations=self.next_observations[end],
            next_actions=self.next_actions[end],
            masks=self.masks[end] * weights,
        )

    def __len__(self) -> int:
        return len(self.rewards)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Draw ``batch_size`` transitions with replacement; ``generator`` must be on the dataset's device."""
        return self.take(self.draw(batch_size, generator))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the indices of ``batch_size`` transitions, as `sample` does."""
        return torch.randint(len(self), (batch_size,), generator=generator, device=self.rewards.device)

    def take(self, index: Tensor) -> Batch:
        """The transitions at these indices, in the shape of ``index``."""
        # on the CPU index_select takes a third of the time of indexing
        rows = (getattr(self, name).index_select(0, index.flatten()) for name in Batch._fields)
        return Batch(*(column.unflatten(0, index.shape) for column in rows))

    def to(self, device: torch.device | str) -> OfflineDataset:
        """The same dataset with its tensors on ``device``."""
        return dataclasses.replace(self, **{column: getattr(self, column).to(device) for column in Batch._fields})
