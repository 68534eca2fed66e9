"""Locomotion through mixed actuators: the same robots and data, in action coordinates of unequal scale.

An action a moves the motors by u = W·a, clipped to [-1, 1], with W = R·diag(g)·Qᵀ for fixed random rotations R and Q
and gains g that span a factor of eight. The data's actions are W⁻¹·u. What can be reached and scored is as in
the plain environment, but the behaviour is sixty-four times narrower (in variance) along some directions
of the action space than along others, relative to the plain one: what a trust region that follows the data is for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np

from train.data import locomotion
from train.data.episode import Episode
from train.data.spec import EnvSpec, Part, Source, Wanted

SPAN = 8.0
"""The largest gain over the smallest."""


def mixing(d: int) -> np.ndarray:
    """W, (d, d). Its inverse maps [-1, 1]^d into [-1, 1]^d, because its smallest gain is √d."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    return left @ np.diag(d**0.5 * np.geomspace(1, SPAN, d)) @ right.T


class MixedActions(gym.ActionWrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        (d,) = env.action_space.shape  # type: ignore[misc]
        self.action_space = gym.spaces.Box(-1.0, 1.0, (d,), np.float32)
        self.matrix = mixing(d)

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.clip(self.matrix @ action, -1, 1)


def make(env_id: str, **options: Any) -> gym.Env:
    return MixedActions(gym.make(env_id, max_episode_steps=-1, **options))  # the mixed environment has the limit


@dataclasses.dataclass(frozen=True)
class Mixed(Source):
    """Another environment's data with actions W⁻¹·u."""

    source: Source
    plain: EnvSpec

    def __str__(self) -> str:
        return f"{self.source}, in mixed actions"

    def is_cached(self, wanted: Wanted) -> bool:
        return self.source.is_cached(wanted)

    def whereabouts(self, wanted: Wanted) -> str:
        return self.source.whereabouts(wanted)

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        return [
            part._replace(origin=f"{part.origin}, in mixed actions", episodes=[_mixed(e) for e in part.episodes])
            for part in self.source.load(self.plain, wanted)
        ]


def _mixed(episode: Episode) -> Episode:
    inverse = np.linalg.inv(mixing(episode.actions.shape[1]))
    return episode._replace(actions=(episode.actions @ inverse.T).astype(np.float32))


def _row(plain: EnvSpec) -> EnvSpec:
    mixed_id = f"fdkernels/Mixed{plain.env_id}"
    if mixed_id not in gym.registry:
        limit = gym.spec(plain.env_id).max_episode_steps
        gym.register(mixed_id, f"{__name__}:make", max_episode_steps=limit, kwargs={"env_id": plain.env_id})
    sources = tuple(Mixed(source, plain) for source in plain.sources)
    return dataclasses.replace(plain, name=f"mixed-{plain.name}", env_id=mixed_id, sources=sources)


ENVIRONMENTS = tuple(_row(spec) for spec in locomotion.ENVIRONMENTS)
