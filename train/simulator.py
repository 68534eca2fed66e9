"""Gymnasium environments, many side by side or one apart, and a quiet MuJoCo."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv


def make_vector_env(env_id: str, num_envs: int, autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> VectorEnv:
    """``num_envs`` copies, stepped one by one in this process: MuJoCo's steps are too short for worker processes."""
    return gym.make_vec(
        env_id, num_envs=num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": autoreset_mode}
    )


@functools.lru_cache(maxsize=2)
def kept_vector_env(env_id: str, num_envs: int) -> VectorEnv:
    """The same environments again for each evaluation: some take seconds to make. Resetting them with a seed leaves
    nothing of the last use. Two sizes are kept, that of interim evaluations and that of the final one."""
    return make_vector_env(env_id, num_envs)


class Apart(gym.Wrapper):
    """What happens after ``reset(seed=...)`` depends on the seed and the actions alone, not on other environments
    played in between: between its steps it keeps the state of NumPy's global generator, from which OGBench's mazes
    draw where a teleport leads."""

    _randomness: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is None and self._randomness is not None:
            np.random.set_state(self._randomness)  # noqa: NPY002
        result = self.env.reset(seed=seed, options=options)
        self._randomness = np.random.get_state()  # noqa: NPY002
        return result

    def step(self, action: Any) -> Any:
        np.random.set_state(self._randomness)  # noqa: NPY002
        result = self.env.step(action)
        self._randomness = np.random.get_state()  # noqa: NPY002
        return result


def _on_mujoco_warning(message: str) -> None:
    # Gymnasium's model files still use an attribute that MuJoCo 3.17 deprecates; users can do nothing about it.
    if "settotalmass" not in message:
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# Without a handler MuJoCo prints every warning and appends it to MUJOCO_LOG.TXT in the working folder.
mujoco.set_mju_user_warning(_on_mujoco_warning)
