"""Minari's folder on this machine, which holds both hosted and generated datasets."""

from __future__ import annotations

import minari
from minari import EpisodeData
from minari.storage import get_dataset_path


class Unreadable(Exception):
    """Minari's folder has no such dataset, or it is damaged."""


def is_cached(dataset_id: str) -> bool:
    # Check both files, because Minari takes the folder of an interrupted download for a dataset.
    return all((get_dataset_path(dataset_id) / "data" / name).exists() for name in ("metadata.json", "main_data.hdf5"))


def read(dataset_id: str) -> list[EpisodeData]:
    """All episodes of a dataset in Minari's folder.

    Raises:
        Unreadable: the dataset is missing or damaged.
    """
    try:
        episodes = list(minari.load_dataset(dataset_id))
        if any(len(e.observations) != len(e) + 1 for e in episodes):
            raise ValueError("an episode lacks its last observation")
    except Exception as error:  # on a damaged file h5py may raise anything
        raise Unreadable(brief(error)) from error
    return episodes


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
