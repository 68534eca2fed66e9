"""Gymnasium's MuJoCo locomotion, with Minari's data or rollouts of the shipped behaviour policies."""

from __future__ import annotations

from collections.abc import Iterator

from train.data.generated import Rollouts
from train.data.hosted import Hosted
from train.data.spec import EnvSpec, NormalizedReturn

# Reference returns from D4RL (infos.py), which measured them on the v2 environments.
ROBOTS = {
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
}
QUALITIES = {
    "simple": ["simple"],
    "medium": ["medium"],
    "expert": ["expert"],
    "medium-expert": ["medium", "expert"],
}


def _rows() -> Iterator[EnvSpec]:
    for robot, (env_id, random_return, expert_return) in ROBOTS.items():
        for quality, parts in QUALITIES.items():
            yield EnvSpec(
                name=f"{robot}-{quality}",
                env_id=env_id,
                sources=(
                    Hosted(tuple(f"mujoco/{robot}/{part}-v0" for part in parts)),
                    Rollouts(tuple(f"{robot}-{part}" for part in parts)),
                ),
                scoring=NormalizedReturn(random_return, expert_return),
                camera="track",  # follows the body; the default camera stands still
            )


ENVIRONMENTS = tuple(_rows())
