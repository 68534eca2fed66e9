"""Minari's folder on this machine, which holds both hosted and generated datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from minari import EpisodeData
from minari.storage import get_dataset_path

from train.data import hdf5
from train.data.damage import require_damage
from train.data.episode import Episode
from train.reading import read_json

MOST_PARTS = 16
"""Arrays that one observation may consist of."""


class Unreadable(Exception):
    """Minari's folder has no such dataset, or it is damaged."""


def is_cached(dataset_id: str) -> bool:
    # Check both files, because Minari takes the folder of an interrupted download for a dataset.
    return all((get_dataset_path(dataset_id) / "data" / name).exists() for name in ("metadata.json", "main_data.hdf5"))


def as_episode(stored: EpisodeData) -> Episode:
    """Minari's own columns; the value ends where the environment terminated."""
    return Episode(stored.observations, stored.actions, stored.rewards, np.logical_not(stored.terminations))


def read(dataset_id: str, convert: Callable[[EpisodeData], Episode] = as_episode) -> list[Episode]:
    """All episodes of a dataset in Minari's folder.

    Minari's own `load_dataset` is not used: it makes the environment that the metadata describe, and with it imports
    any module and calls any function that they name.

    Raises:
        Unreadable: the dataset is missing, damaged, or has an episode without an end.
        OSError: it could not be read, or there is no memory for it, which says nothing about it.
    """
    folder = get_dataset_path(dataset_id) / "data"
    recording = folder / "main_data.hdf5"
    try:
        metadata = read_json(folder / "metadata.json")
        count, layout = metadata["total_episodes"], metadata.get("data_format", "hdf5")
        if layout != "hdf5" or not isinstance(count, int):
            raise ValueError(f"its metadata have {count!r:.20} episodes in the format {layout!r:.20}")
        with hdf5.opened(recording) as arrays:
            return [convert(_stored(arrays, i)) for i in range(count)]
    except Exception as error:  # on a damaged file h5py may raise anything
        require_damage(error, recording)
        raise Unreadable(brief(error)) from error


def _stored(arrays: hdf5.Arrays, i: int) -> EpisodeData:
    """The i-th episode, without its infos."""
    group = arrays.find(arrays.file, f"episode_{i}")
    if not isinstance(group, h5py.Group):
        raise ValueError(f"episode {i} is not a group")
    rewards, terminations, truncations = (
        arrays.array(group, name) for name in ("rewards", "terminations", "truncations")
    )
    if rewards.ndim != 1 or not rewards.shape == terminations.shape == truncations.shape:
        raise ValueError(f"episode {i} has {rewards.shape} rewards and {terminations.shape}, {truncations.shape} ends")
    if not len(rewards):
        raise ValueError(f"episode {i} has no steps")
    if not (terminations[-1] or truncations[-1]):
        raise ValueError(f"episode {i} has no end: its last step neither terminates nor is cut off")
    if np.any(terminations[:-1]):
        raise ValueError(f"episode {i} goes on after it terminated")
    observations, actions = _observations(arrays, group), _floats(arrays, group, "actions")
    return EpisodeData(i, observations, actions, rewards, terminations, truncations, {})


def _observations(arrays: hdf5.Arrays, group: h5py.Group) -> Any:
    """One array, or several by name."""
    found = arrays.find(group, "observations")
    if isinstance(found, h5py.Dataset):
        return _floats(arrays, group, "observations")
    if not isinstance(found, h5py.Group) or len(found) > MOST_PARTS:
        raise ValueError(f"{found.name} is neither an array nor a few of them")
    return {name: _floats(arrays, found, name) for name in found}


def _floats(arrays: hdf5.Arrays, group: h5py.Group, name: str) -> np.ndarray:
    found = arrays.array(group, name)
    if found.dtype.kind != "f":  # Minari keeps images as the bytes of JPEG files
        raise ValueError(f"{group.name}/{name} has {found.dtype}, not floating-point numbers")
    return found


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
