"""The data a run learns from: Minari's datasets, or rollouts of the behaviour policies that ship with the project."""

from __future__ import annotations

import contextlib
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import minari
import numpy as np
from filelock import FileLock
from huggingface_hub import constants, utils
from minari import EpisodeData
from minari.storage import get_dataset_path

from train.behaviour.policy import POLICIES
from train.behaviour.rollout import store_rollouts
from train.dataset import OfflineDataset
from train.environments import ENVIRONMENTS, EnvSpec, normalized_score

Size = Literal["default", "full"]

EPISODES: dict[Size, int] = {"default": 100, "full": 1000}
"""Episodes that each behaviour policy plays."""

PROBE_SECONDS = 3.0


class DatasetUnavailable(RuntimeError):
    """There is no data to learn from; the message says what was tried and what to do."""


class _Unreadable(Exception):
    """Minari finds no dataset in its folder, or a damaged one."""


def load_dataset(
    spec: EnvSpec, *, size: Size = "default", download: bool = True, policies: Path = POLICIES
) -> OfflineDataset:
    """Read the data of an environment from Minari's folder, getting it there first if need be.

    Tried in this order: the hosted datasets in Minari's local cache; rollouts that an earlier call generated, so that
    a resumed run keeps its data when a network has come or gone; a download; new rollouts of the behaviour policies.
    The parts of a combined dataset are all hosted or all generated.

    Args:
        spec: a row of ``train.environments.ENVIRONMENTS``.
        size: of generated data, ``EPISODES`` per policy. Hosted datasets have the size they have.
        download: whether to look for hosted datasets beyond the local cache.
        policies: folder of the behaviour policies.

    Raises:
        DatasetUnavailable: none of this worked, or a hosted dataset in the cache is damaged.
    """
    if all(map(_is_cached, spec.dataset_ids)):
        return _load_hosted(spec, "Minari, local cache")
    # -v0 is to be raised when the policies or the way they are played change
    own_ids = [f"fdkernels/{policy.replace('-', '/', 1)}-{EPISODES[size]}ep-v0" for policy in spec.policies]
    own_cached = bool(own_ids) and all(map(_is_cached, own_ids))
    problem: str | None = "not looked for"
    if own_cached:
        problem = f"not looked for, rollouts are in {get_dataset_path(own_ids[0]).parent}"
    elif download:
        problem = _download(spec.dataset_ids)
        if problem is None:
            return _load_hosted(spec, "Minari, downloaded now")
    if not own_cached and not _can_generate(spec, policies):
        generable = [other.name for other in ENVIRONMENTS.values() if _can_generate(other, policies)]
        raise DatasetUnavailable(
            f"no data for {spec.name}.\n"
            f"  local cache: {get_dataset_path()} lacks {' or '.join(spec.dataset_ids)}\n"
            f"  download: {problem}\n"
            f"  generate: {policies} lacks a behaviour policy for it, has them for {', '.join(generable) or 'none'}\n"
            f"What to do: run `minari download {' '.join(spec.dataset_ids)}` where there is a network and copy what it "
            "fetched into the same place under that cache, or set MINARI_DATASETS_PATH to another cache."
        )
    files = _policy_files(spec, policies)
    parts = [_load_generated(dataset_id, spec, file, EPISODES[size]) for dataset_id, file in zip(own_ids, files)]
    return _combine(spec, parts, f"Minari's {' and '.join(spec.dataset_ids)}: {problem}")


def _policy_files(spec: EnvSpec, policies: Path) -> list[Path]:
    return [policies / f"{policy}.safetensors" for policy in spec.policies]


def _can_generate(spec: EnvSpec, policies: Path) -> bool:
    return bool(spec.policies) and all(file.exists() for file in _policy_files(spec, policies))


class _Part(NamedTuple):
    dataset_id: str
    origin: str
    episodes: list[EpisodeData]


def _combine(spec: EnvSpec, parts: list[_Part], *preface: str) -> OfflineDataset:
    lines = list(preface)
    for dataset_id, origin, episodes in parts:
        mean = float(np.mean([e.rewards.sum() for e in episodes]))
        lines.append(
            f"{dataset_id} ({origin}): {len(episodes):,} episodes, {sum(map(len, episodes)):,} transitions, "
            f"mean return {mean:,.0f} (normalised {normalized_score(spec, mean):.1f})"
        )
    ids = tuple(part.dataset_id for part in parts)
    return OfflineDataset.from_episodes([e for part in parts for e in part.episodes], ids, tuple(lines))


def _is_cached(dataset_id: str) -> bool:
    # Both, because Minari takes the folder of an interrupted download for a dataset.
    return all((get_dataset_path(dataset_id) / "data" / name).exists() for name in ("metadata.json", "main_data.hdf5"))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _read(dataset_id: str) -> list[EpisodeData]:
    try:
        episodes = list(minari.load_dataset(dataset_id))
        if any(len(e.observations) != len(e) + 1 for e in episodes):
            raise ValueError("an episode lacks its last observation")
    except Exception as error:  # h5py answers a damaged file with whatever its bytes suggest
        raise _Unreadable(_brief(error)) from error
    return episodes


def _load_hosted(spec: EnvSpec, origin: str) -> OfflineDataset:
    parts = []
    for dataset_id in spec.dataset_ids:
        try:
            parts.append(_Part(dataset_id, origin, _read(dataset_id)))
        except _Unreadable as error:
            raise DatasetUnavailable(
                f"{dataset_id} in Minari's local cache cannot be read ({error}).\n"
                f"What to do: delete the folder {get_dataset_path(dataset_id)} and run again to have it downloaded."
            ) from error
    return _combine(spec, parts)


def _download(dataset_ids: Sequence[str]) -> str | None:
    """Complete the local cache; what went wrong, or None."""
    problem = _hub_problem()
    if problem is not None:
        return problem
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="minari")  # on namespaces, newer versions
            for dataset_id in dataset_ids:
                if not _is_cached(dataset_id):
                    # forced, else the folder of an interrupted download would be skipped instead of completed
                    minari.download_dataset(dataset_id, force_download=True)
    except Exception as error:  # Minari, the hub's client and the HTTP library share no base class
        return f"failed ({_brief(error)})"
    return None if all(map(_is_cached, dataset_ids)) else "came without its data files"


def _hub_problem() -> str | None:
    """Why the hub that hosts Minari's datasets cannot be reached; None if it answers.

    The hub's client retries for half a minute without a network, so one request decides beforehand. That client sends
    it, hence through the same proxy and with the same certificates; a thread does, because the time limit of a request
    covers neither the look-up of the name nor the trial of several addresses.
    """
    hub = constants.ENDPOINT
    answers: list[str | None] = []

    def ask() -> None:
        try:
            status = utils.get_session().head(hub, timeout=PROBE_SECONDS).status_code
            refused = status >= 500 or status in (403, 407)  # a proxy, or a hub that is down: retries would go on
            answers.append(f"{hub} cannot be reached (HTTP status {status})" if refused else None)
        except Exception as error:  # of the HTTP library that this version of the client is built on
            answers.append(f"{hub} cannot be reached ({_brief(error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"{hub} did not answer within {PROBE_SECONDS:g} s"


def _load_generated(dataset_id: str, spec: EnvSpec, policy_file: Path, episodes: int) -> _Part:
    origin = f"rollouts of the behaviour policy {policy_file.stem} in {spec.env_id}"
    with contextlib.suppress(_Unreadable):
        return _Part(dataset_id, f"{origin}, local cache", _read(dataset_id))
    folder = get_dataset_path(dataset_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved into place whole, so that a killed run leaves nothing that looks like data; one process
    # at a time, the others wait and read. The lock of a killed process is released.
    staging = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        with contextlib.suppress(_Unreadable):
            return _Part(dataset_id, f"{origin}, local cache", _read(dataset_id))
        damaged = folder.exists()
        shutil.rmtree(staging, ignore_errors=True)
        try:
            store_rollouts(staging, dataset_id, spec, policy_file, episodes)
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    origin += ", generated again because the copy in the cache was damaged" if damaged else ", generated now"
    return _Part(dataset_id, origin, _read(dataset_id))
