"""Play whole episodes with a behaviour policy, and store them as a Minari dataset."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from train.behaviour.policy import BadPolicy, BehaviourPolicy, policy_note
from train.data.spec import EnvSpec, NormalizedReturn
from train.progress import bar
from train.simulator import make_vector_env

Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def collect(env_id: str, policy: Policy, *, episodes: int, seed: int, num_envs: int = 4) -> Iterator[EpisodeBuffer]:
    """Yield ``episodes`` whole episodes in the order in which they end.

    An episode of T steps has T actions, rewards and flags, and T + 1 observations; the last is its final state. Its
    ``seed`` is the one that its environment was reset with. The same arguments give the same episodes.

    Args:
        env_id: gymnasium environment id; the environment must have a time limit.
        policy: maps observations (n, obs_dim) and a generator to actions (n, action_dim).
        episodes: number of episodes, at least one.
        seed: seeds the initial states and the policy's noise.
        num_envs: environments stepped together. Few, because with more rows OpenBLAS spreads a policy call over
            threads: they gain nothing, and their spinning slows the simulator down (by a factor of 4, measured on two
            busy cores). If all episodes are equally long, a divisor of ``episodes`` wastes no steps.
    """
    horizon = gym.spec(env_id).max_episode_steps
    if horizon is None:
        raise ValueError(f"collect: {env_id} has no time limit, so its episodes need not end")
    n = min(num_envs, episodes)
    rng = np.random.default_rng(seed)
    seeds = rng.integers(2**31, size=episodes)
    # Autoreset is off because the automatic modes draw initial states that no stored seed can reproduce.
    envs = make_vector_env(env_id, n, AutoresetMode.DISABLED)
    try:
        obs, _ = envs.reset(seed=seeds[:n].tolist())
        observations = np.empty((n, horizon + 1, *obs.shape[1:]), np.float32)
        actions = np.empty((n, horizon, *(envs.single_action_space.shape or ())), np.float32)
        rewards = np.empty((n, horizon))
        observations[:, 0] = obs
        rows, steps = np.arange(n), np.zeros(n, int)
        playing, started, kept = np.arange(n), n, 0
        while kept < episodes:
            action = policy(obs, rng)
            obs, reward, terminated, truncated, _ = envs.step(action)
            actions[rows, steps], rewards[rows, steps] = action, reward
            steps += 1
            observations[rows, steps] = obs
            over = terminated | truncated
            if not over.any():
                continue
            for i in np.flatnonzero(over):
                # Keep the first episodes to start; keeping the first to end would favour short ones. An environment
                # with nothing left to do plays on, and its episodes are dropped.
                if playing[i] < episodes:
                    t, kept = steps[i], kept + 1
                    last = np.arange(t) == t - 1
                    yield EpisodeBuffer(
                        seed=int(seeds[playing[i]]),
                        observations=observations[i, : t + 1].copy(),
                        actions=actions[i, :t].copy(),
                        rewards=rewards[i, :t].copy(),
                        terminations=last & terminated[i],
                        truncations=last & truncated[i],
                    )
                playing[i], started = started, started + 1
            obs, _ = envs.reset(seed=seeds[playing % episodes].tolist(), options={"reset_mask": over})
            observations[over, 0], steps[over] = obs[over], 0
    finally:
        envs.close()


def store_rollouts(folder: Path, dataset_id: str, spec: EnvSpec, policy_file: Path, episodes: int) -> None:
    """Write ``episodes`` episodes of a stored policy into ``folder``, which becomes the Minari dataset ``dataset_id``.

    Minari's own writers derive the folder from the id. Here the caller chooses it, to write it elsewhere and rename it.
    """
    assert isinstance(spec.scoring, NormalizedReturn), "the behaviour policies are scored by their returns"
    seed = zlib.crc32(dataset_id.encode())  # no two datasets share their initial states
    env = gym.make(spec.env_id)
    obs_shape = env.observation_space.shape
    policy = BehaviourPolicy.load(policy_file)
    if policy.widths != (obs_shape, env.action_space.shape):
        raise BadPolicy(f"{policy_file} is for observations and actions of {policy.widths}, not those of {spec.env_id}")
    folder.mkdir()
    storage = MinariStorage.new(
        folder / "data",
        observation_space=gym.spaces.Box(-np.inf, np.inf, obs_shape, np.float32),
        action_space=env.action_space,
        env_spec=env.spec,
    )
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "author": {"fdkernels"},
            "algorithm_name": "SAC",
            "description": f"Rollouts of the behaviour policy {policy_file.stem}, made by train/behaviour/rollout.py.",
            "requirements": [f"mujoco=={mujoco.__version__}", f"gymnasium=={gym.__version__}"],
            "ref_min_score": spec.scoring.random,
            "ref_max_score": spec.scoring.expert,
            "seed": seed,
            "policy": policy_note(policy_file),
        }
    )
    numbers = np.prod(obs_shape or ()) + np.prod(env.action_space.shape or ())
    row = 4 * numbers + 10  # also a reward in float64 and two flags
    horizon = gym.spec(spec.env_id).max_episode_steps or 0
    _reserve(folder / "data" / "main_data.hdf5", episodes * int(1.5 * row * horizon + 32_768))
    rollouts = collect(spec.env_id, policy, episodes=episodes, seed=seed)
    storage.update_episodes(bar(rollouts, desc=f"generating {dataset_id}", total=episodes, unit="episode"))


def _reserve(path: Path, size: int) -> None:
    """Turn an empty file into an HDF5 file with this much room, of which HDF5 gives back what it does not need.

    A disk that is full is found out here, because HDF5 does not recover: it fails again on closing, and at exit.
    """
    _allocate(path, size)
    with h5py.File(path, "w", track_order=True):  # as Minari opens it
        pass
    _allocate(path, size)


def _allocate(path: Path, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
