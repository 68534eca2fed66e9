"""The environments by the names people know, and gymnasium's MuJoCo made quiet.

``python train/environments.py`` lists the names.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator
from typing import TypeVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

Returns = TypeVar("Returns", float, np.ndarray)


class UnknownEnvironment(ValueError):
    """No environment of that name; the message gives the nearest ones."""


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """One row of the table: an environment together with the data that it is learned from."""

    name: str
    env_id: str
    """Gymnasium id, for evaluation."""
    dataset_ids: tuple[str, ...]
    """Minari datasets; several are concatenated."""
    policies: tuple[str, ...]
    """Behaviour policies that can stand in for the datasets, one each."""
    random_return: float
    """Return that scores 0."""
    expert_return: float
    """Return that scores 100."""


def _mujoco_locomotion() -> Iterator[EnvSpec]:
    # References of D4RL (infos.py), measured there on the v2 environments.
    families = {
        "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
        "hopper": ("Hopper-v5", -20.272305, 3234.3),
        "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    }
    qualities = {
        "simple": ["simple"],
        "medium": ["medium"],
        "expert": ["expert"],
        "medium-expert": ["medium", "expert"],
    }
    for family, (env_id, random_return, expert_return) in families.items():
        for quality, parts in qualities.items():
            yield EnvSpec(
                name=f"{family}-{quality}",
                env_id=env_id,
                dataset_ids=tuple(f"mujoco/{family}/{part}-v0" for part in parts),
                policies=tuple(f"{family}-{part}" for part in parts),
                random_return=random_return,
                expert_return=expert_return,
            )


ENVIRONMENTS: dict[str, EnvSpec] = {spec.name: spec for spec in _mujoco_locomotion()}


def resolve(name: str) -> EnvSpec:
    """The row of that name.

    Raises:
        UnknownEnvironment: there is none.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    nearest = difflib.get_close_matches(name.lower(), ENVIRONMENTS, n=3)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    raise UnknownEnvironment(
        f"unknown environment {name!r}.{hint} `python train/environments.py` lists all {len(ENVIRONMENTS)}."
    )


def normalized_score(spec: EnvSpec, returns: Returns) -> Returns:
    """D4RL's score: 0 at the return of a random policy, 100 at the expert's."""
    return 100 * (returns - spec.random_return) / (spec.expert_return - spec.random_return)


def _on_mujoco_warning(message: str) -> None:
    # Gymnasium's model files still use an attribute that MuJoCo 3.17 deprecates; nothing a user can act on.
    if "settotalmass" not in message:
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# Without a handler MuJoCo prints, and appends every warning to MUJOCO_LOG.TXT in the working folder.
mujoco.set_mju_user_warning(_on_mujoco_warning)


def make_vector_env(env_id: str, num_envs: int, autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> VectorEnv:
    """``num_envs`` copies, stepped in turn in this process: MuJoCo steps are too short for worker processes."""
    return gym.make_vec(
        env_id, num_envs=num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": autoreset_mode}
    )


if __name__ == "__main__":
    print("\n".join(ENVIRONMENTS))
