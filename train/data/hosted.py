"""Datasets that Minari hosts, read from its local cache or downloaded into it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import minari
from filelock import FileLock
from huggingface_hub import constants, utils
from minari import EpisodeData
from minari.storage import get_dataset_path

from train.data import minari_cache, network
from train.data.episode import Episode
from train.data.network import problem_with
from train.data.spec import DatasetUnavailable, EnvSpec, NotHere, Part, Source, Wanted


@dataclasses.dataclass(frozen=True)
class Hosted(Source):
    """Hosted datasets of Minari, concatenated."""

    dataset_ids: tuple[str, ...]
    convert: Callable[[EpisodeData], Episode] = minari_cache.as_episode

    def __str__(self) -> str:
        return f"Minari's {' and '.join(self.dataset_ids)}"

    def is_cached(self, wanted: Wanted) -> bool:
        return all(map(minari_cache.is_cached, self.dataset_ids))

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        if self.is_cached(wanted):
            return self._read("Minari, local cache")
        problem = _download(self.dataset_ids) if wanted.download else "not looked for"
        if problem is None:
            return self._read("Minari, downloaded now")
        raise NotHere(
            problem,
            tried=(
                f"local cache: {get_dataset_path()} lacks {' or '.join(self.dataset_ids)}",
                f"download: {problem}",
            ),
            remedy=f"run `minari download {' '.join(self.dataset_ids)}` where there is a network and copy what it "
            "fetched into the same place under that cache, or set MINARI_DATASETS_PATH to another cache.",
        )

    def _read(self, origin: str) -> list[Part]:
        parts = []
        for dataset_id in self.dataset_ids:
            try:
                parts.append(Part(dataset_id, origin, minari_cache.read(dataset_id, self.convert)))
            except minari_cache.Unreadable as error:
                raise DatasetUnavailable(
                    f"{dataset_id} in Minari's local cache cannot be read ({error}).\n"
                    f"What to do: delete the folder {get_dataset_path(dataset_id)} and run again to have it downloaded."
                ) from error
        return parts


def _download(dataset_ids: Sequence[str]) -> str | None:
    """Download what the local cache lacks; returns what went wrong, or None."""
    problem = _hub_problem()
    if problem is not None:
        return problem
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="minari")  # namespaces, newer versions
            for dataset_id in dataset_ids:
                folder = get_dataset_path(dataset_id)
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process downloads, the others wait
                    if not minari_cache.is_cached(dataset_id):
                        # forced, because Minari would otherwise skip the folder of an interrupted download
                        minari.download_dataset(dataset_id, force_download=True)
    except Exception as error:  # Minari, the hub's client and the HTTP library share no base class
        return f"failed ({minari_cache.brief(error)})"
    return None if all(map(minari_cache.is_cached, dataset_ids)) else "came without its data files"


def _hub_problem() -> str | None:
    """Why the hub that hosts Minari's datasets cannot be reached; None if it answers.

    Without a network the hub's client retries for half a minute, so a single request finds out first. The client itself
    sends it, through the same proxy and with the same certificates.
    """
    hub = constants.ENDPOINT
    return problem_with(hub, lambda: utils.get_session().head(hub, timeout=network.PROBE_SECONDS).status_code)
