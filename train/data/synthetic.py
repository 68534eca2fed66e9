"""Random transitions, the same each time, for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from train.data.episode import Episode
from train.data.transitions import OfflineDataset


def random_dataset(n: int, obs_dim: int, action_dim: int, dtype: torch.dtype = torch.float32) -> OfflineDataset:
    """``n`` transitions in three episodes of unequal length."""
    rng = np.random.default_rng(7)
    episodes = [
        Episode(
            observations=rng.standard_normal((steps + 1, obs_dim)),
            actions=rng.uniform(-1, 1, (steps, action_dim)),
            rewards=rng.standard_normal(steps),
            masks=rng.uniform(size=steps) > 0.02,
        )
        for steps in np.diff([0, n // 7, n // 2, n])
    ]
    made = OfflineDataset.from_episodes(episodes)
    return dataclasses.replace(
        made,
        states=made.states.to(dtype),
        actions=made.actions.to(dtype),
        rewards=made.rewards.to(dtype),
        masks=made.masks.to(dtype),
    )
