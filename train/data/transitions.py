"""Transitions in memory, from whole episodes to random batches."""

from __future__ import annotations

import dataclasses
import warnings
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
    """N transitions of whole episodes. Every state is stored once.

    An episode of T steps gives T transitions (o_i, a_i, r_i, o_{i+1}) and has T + 1 rows among the states:

        states    o_0   o_1   o_2   ...   o_{T-1}   o_T
        actions      a_0   a_1   a_2   ...    a_{T-1}

    The next observation never comes from the following episode, because o_T is stored. If a time limit ended the
    episode, the mask stays 1, because the value of o_T still counts.
    """

    states: Tensor
    """(N + episodes, obs_dim) float32; or images, (N + episodes, height, width, channels) uint8"""
    rows: Tensor
    """(N,) int64: the row of ``states`` that transition i starts from"""
    actions: Tensor
    """(N, action_dim) float32, within ±``ACTION_BOUND``"""
    rewards: Tensor
    """(N,) float32; sums of several with `n_step`"""
    masks: Tensor
    """(N,) float32: 0 where the environment terminated or the goal was reached, else 1. After `n_step`
    the weight of the value that follows"""
    next_rows: Tensor
    """(N,) int64: the row of ``states`` that transition i leads to"""
    next_steps: Tensor
    """(N,) int64: the transition with the next action; at the end of an episode its last one, since none follows"""
    episode_lengths: np.ndarray
    """(episodes,) int64, transitions in each episode"""
    outcomes: Outcomes = dataclasses.field(default_factory=lambda: outcomes_of(()))
    """What the episodes came to"""
    dataset_ids: tuple[str, ...] = ()
    """Minari ids, or OGBench's names."""
    source: tuple[str, ...] = ()
    """Lines to display: which data this is and where it came from."""
    frame_stack: int = 1
    """States that one observation consists of, see `stack_frames`"""
    first_rows: Tensor | None = None
    """(N,) int64: the row of the first state of each transition's episode; None unless frames are stacked"""

    @classmethod
    def from_episodes(
        cls, episodes: Sequence[Episode], dataset_ids: tuple[str, ...] = (), source: tuple[str, ...] = ()
    ) -> OfflineDataset:
        """Concatenate whole episodes, each with one more observation than actions.

        Observations in float32 or uint8 that lie one after the other in memory, as in a file of all episodes, are not
        copied.
        """
        lengths = np.array([len(e.rewards) for e in episodes])
        steps = np.arange(lengths.sum())
        rows = torch.from_numpy(steps + np.repeat(np.arange(len(lengths)), lengths))
        last = np.repeat(np.cumsum(lengths) - 1, lengths)
        actions = torch.from_numpy(_joined([e.actions for e in episodes]).clip(-ACTION_BOUND, ACTION_BOUND))
        images = all(e.observations.dtype == np.uint8 for e in episodes)
        states = _joined([e.observations for e in episodes], np.uint8 if images else np.float32)
        with warnings.catch_warnings():
            # a file that is mapped into memory is read-only, and nothing writes to states
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(states)
        return cls(
            states=tensor,
            rows=rows,
            actions=actions,
            rewards=torch.from_numpy(_joined([e.rewards for e in episodes])),
            masks=torch.from_numpy(_joined([e.masks for e in episodes])),
            next_rows=rows + 1,
            next_steps=torch.from_numpy(np.minimum(steps + 1, last)),
            episode_lengths=lengths,
            outcomes=outcomes_of(episodes),
            dataset_ids=dataset_ids,
            source=source,
        )

    @property
    def observations(self) -> Tensor:
        """(N, obs_dim), a copy; of images single frames"""
        return self.states[self.rows]

    @property
    def next_observations(self) -> Tensor:
        """(N, obs_dim), a copy; of images single frames"""
        return self.states[self.next_rows]

    @property
    def next_actions(self) -> Tensor:
        """(N, action_dim), a copy"""
        return self.actions[self.next_steps]

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """The shape of one observation in a batch."""
        *shape, channels = self.states.shape[1:]
        return (*shape, channels * self.frame_stack)

    def stack_frames(self, count: int) -> OfflineDataset:
        """Observations of the last ``count`` states, joined along their last axis, the newest last.

        Before the first state of an episode it is repeated. States are stored as before; `take` joins them.
        """
        first = np.cumsum(self.episode_lengths + 1) - (self.episode_lengths + 1)
        first_rows = torch.from_numpy(np.repeat(first, self.episode_lengths)).to(self.rows.device)
        return dataclasses.replace(self, frame_stack=count, first_rows=first_rows)

    def n_step(self, n: int, discount: float) -> OfflineDataset:
        """Transitions over up to ``n`` steps of an episode, so that r + γ·m·Q(s', a') is their n-step target.

        Rewards become Σ γ^i r_i. The next observation and action are those after the last of these steps. Masks become
        γ^(steps − 1) or 0, so that γ·m weighs the value that follows (Sutton and Barto, chapter 7). There are fewer
        steps where a mask is 0 or the episode ends before.
        """
        start = np.arange(len(self))
        stops = np.union1d(np.cumsum(self.episode_lengths) - 1, np.flatnonzero(self.masks.cpu().numpy() == 0))
        end = np.minimum(start + n - 1, stops[np.searchsorted(stops, start)])
        rewards, device = torch.zeros_like(self.rewards), self.rewards.device
        for i in range(min(n, int(self.episode_lengths.max(initial=0)))):
            at = np.minimum(start + i, end)
            rewards += torch.where(torch.from_numpy(start + i <= end).to(device), discount**i * self.rewards[at], 0.0)
        weights = torch.from_numpy(discount ** (end - start)).to(self.masks)
        return dataclasses.replace(
            self,
            rewards=rewards,
            masks=self.masks[end] * weights,
            next_rows=self.next_rows[end],
            next_steps=self.next_steps[end],
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
        steps = index.flatten()

        def of(table: Tensor, at: Tensor) -> Tensor:
            # on the CPU index_select takes a third of the time of indexing
            return table.index_select(0, at)

        def observed(rows: Tensor) -> Tensor:
            if self.first_rows is None:
                return of(self.states, rows)
            ages = torch.arange(self.frame_stack - 1, -1, -1, device=rows.device)
            at = torch.maximum(rows.unsqueeze(1) - ages, of(self.first_rows, steps).unsqueeze(1))
            # images as flat rows, which index_select copies whole, and cat, which is faster than a transposed copy
            frames = of(self.states.flatten(1), at.T.flatten()).view(
                self.frame_stack, len(rows), *self.states.shape[1:]
            )
            return torch.cat(frames.unbind(), dim=-1)

        batch = (
            observed(of(self.rows, steps)),
            of(self.actions, steps),
            of(self.rewards, steps),
            observed(of(self.next_rows, steps)),
            of(self.masks, steps),
            of(self.actions, of(self.next_steps, steps)),
        )
        return Batch(*(column.unflatten(0, index.shape) for column in batch))

    def to(self, device: torch.device | str) -> OfflineDataset:
        """The same dataset with its tensors on ``device``."""
        return dataclasses.replace(
            self,
            states=self.states.to(device),
            rows=self.rows.to(device),
            actions=self.actions.to(device),
            rewards=self.rewards.to(device),
            masks=self.masks.to(device),
            next_rows=self.next_rows.to(device),
            next_steps=self.next_steps.to(device),
            first_rows=None if self.first_rows is None else self.first_rows.to(device),
        )


def _joined(parts: Sequence[np.ndarray], dtype: type = np.float32) -> np.ndarray:
    """The parts one after the other in that type: a view of their memory if they lie there like that."""
    base, address = parts[0].base, parts[0].ctypes.data
    for part in parts:
        inside = base is not None and part.base is base and part.ctypes.data == address
        if not inside or part.dtype != dtype or not part.flags.c_contiguous:
            return np.concatenate(parts, dtype=dtype)
        address += part.nbytes
    return np.lib.stride_tricks.as_strided(parts[0], (sum(map(len, parts)), *parts[0].shape[1:]))
