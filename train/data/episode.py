"""Whole episodes: what every source of data gives, and what is refused before anything learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ACTION_TOLERANCE = 1e-4
"""How far an action may leave [-1, 1], for rounding to float32."""


class Episode(NamedTuple):
    """T steps of one episode."""

    observations: np.ndarray
    """(T + 1, obs_dim), or images (T + 1, height, width, channels) in uint8; the last one is the state that the last
    action led to"""
    actions: np.ndarray
    """(T, action_dim), in [-1, 1]"""
    rewards: np.ndarray
    """(T,)"""
    masks: np.ndarray
    """(T,): False where nothing of value follows: the environment terminated, or the task's goal was reached"""
    success: bool = False
    """Whether the task's goal was reached, for tasks that have one"""


class Outcomes(NamedTuple):
    """What N episodes came to."""

    returns: np.ndarray
    """(N,) float64, undiscounted"""
    successes: np.ndarray
    """(N,) bool: whether the goal was reached; False in environments without one"""


def outcomes_of(episodes: Sequence[Episode]) -> Outcomes:
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    return Outcomes(returns, np.array([episode.success for episode in episodes], bool))


class BadEpisode(ValueError):
    """An episode that nothing should learn from; the message says which one and why."""


def check_episodes(episodes: Sequence[Episode]) -> None:
    """Refuse episodes that are damaged or do not fit together.

    Raises:
        BadEpisode: there are none; one is empty, lacks an observation, has actions outside [-1, 1], or numbers that are
            NaN or, in float32, infinite; or its observations or actions are shaped otherwise than in the first one.
    """
    if not episodes:
        raise BadEpisode("there are no episodes")
    widths: list[tuple[int | str, ...]] = [column.shape[1:] for column in episodes[0][:2]]
    widths[1] = widths[1] or ("action_dim",)
    for i, (observations, actions, rewards, masks, _) in enumerate(episodes):
        steps = len(actions)
        if steps == 0:
            raise BadEpisode(f"episode {i} has no steps")
        for name, column, wanted in (
            ("observations", observations, (steps + 1, *widths[0])),
            ("actions", actions, (steps, *widths[1])),
            ("rewards", rewards, (steps,)),
            ("masks", masks, (steps,)),
        ):
            if column.shape != wanted:
                raise BadEpisode(f"episode {i} has {name} of shape {column.shape}, and {wanted} would fit")
            if not np.issubdtype(column.dtype, np.inexact):  # images are larger than memory, and cannot have NaN
                continue
            bad = ~(np.abs(column) <= np.finfo(np.float32).max)  # as which it is stored; true of NaN, too
            if bad.any():
                at = tuple(int(where) for where in np.argwhere(bad)[0])
                raise BadEpisode(f"episode {i} has {column[at]} in its {name}, at {at}")
        outside = np.abs(actions) > 1 + ACTION_TOLERANCE
        if outside.any():
            at = tuple(int(where) for where in np.argwhere(outside)[0])
            raise BadEpisode(f"episode {i} has the action {actions[at]:g} outside [-1, 1], at {at}")
