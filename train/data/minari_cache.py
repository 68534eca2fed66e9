"""Minari's folder on this machine, which holds both hosted and generated datasets."""

from __future__ import annotations

from collections.abc import Callable

import minari
import numpy as np
from minari import EpisodeData
from minari.storage import get_dataset_path

from train.data.episode import Episode


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

    Raises:
        Unreadable: the dataset is missing, damaged, or has an episode without an end.
    """
    try:
        episodes = []
        for i, stored in enumerate(minari.load_dataset(dataset_id)):
            if len(stored.rewards) and not (stored.terminations[-1] or stored.truncations[-1]):
                raise ValueError(f"episode {i} has no end: its last step neither terminates nor is cut off")
            if np.any(stored.terminations[:-1]):
                raise ValueError(f"episode {i} goes on after it terminated")
            episodes.append(convert(stored))
    except Exception as error:  # on a damaged file h5py may raise anything
        raise Unreadable(brief(error)) from error
    return episodes


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
