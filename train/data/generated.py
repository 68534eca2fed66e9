"""Rollouts of behaviour policies, by default those of this project, generated once and kept in Minari's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path

from filelock import FileLock
from minari.storage import get_dataset_path

from train.behaviour.policy import POLICIES, BadPolicy
from train.behaviour.rollout import store_rollouts
from train.data import minari_cache
from train.data.spec import DatasetUnavailable, EnvSpec, NotHere, Part, Size, Source, Wanted
from train.outputs.files import naming, sync_files, sync_folder

EPISODES = {"default": 100, "full": 1000}
"""Episodes that each behaviour policy plays."""


def episodes_of(size: Size) -> int:
    return size if isinstance(size, int) else EPISODES[size]


@dataclasses.dataclass(frozen=True)
class Rollouts(Source):
    """Rollouts of behaviour policies: one dataset per policy, concatenated."""

    policies: tuple[str, ...]

    def __str__(self) -> str:
        return f"rollouts of {' and '.join(self.policies)}"

    def is_cached(self, wanted: Wanted) -> bool:
        if wanted.policies != POLICIES and not self.can_generate(wanted):
            return False  # what may be there is of the policies that ship
        return all(map(minari_cache.is_cached, self.dataset_ids(wanted)))

    def whereabouts(self, wanted: Wanted) -> str:
        return f"rollouts are in {get_dataset_path(self.dataset_ids(wanted)[0]).parent}"

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        if not self.is_cached(wanted) and not self.can_generate(wanted):
            generable = [
                other.name
                for other in wanted.environments
                if any(isinstance(source, Rollouts) and source.can_generate(wanted) for source in other.sources)
            ]
            reason = f"{wanted.policies} lacks a behaviour policy for it"
            raise NotHere(reason, tried=[f"generate: {reason}, has them for {', '.join(generable) or 'none'}"])
        named = zip(self.dataset_ids(wanted), self._files(wanted))
        try:
            return [_read_or_generate(dataset_id, spec, file, episodes_of(wanted.size)) for dataset_id, file in named]
        except BadPolicy as error:
            raise DatasetUnavailable(str(error)) from error

    def dataset_ids(self, wanted: Wanted) -> list[str]:
        # raise -v0 when the policies that ship or the way they are played change
        return [
            f"fdkernels/{file.stem.replace('-', '/', 1)}-{_mark(file)}{episodes_of(wanted.size)}ep-v0"
            for file in self._files(wanted)
        ]

    def can_generate(self, wanted: Wanted) -> bool:
        return all(file.is_file() for file in self._files(wanted))

    def _files(self, wanted: Wanted) -> list[Path]:
        return [wanted.policies / f"{policy}.safetensors" for policy in self.policies]


def _mark(file: Path) -> str:
    """What tells rollouts of this policy from those of the one that ships under its name; nothing if it is that one."""
    shipped = POLICIES / file.name
    if file == shipped:
        return ""
    found = _digest(file)
    return "" if shipped.is_file() and found == _digest(shipped) else f"{found}-"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]


def _read_or_generate(dataset_id: str, spec: EnvSpec, policy_file: Path, episodes: int) -> Part:
    origin = f"rollouts of the behaviour policy {policy_file.stem} in {spec.env_id}"
    with contextlib.suppress(minari_cache.Unreadable):
        return Part(dataset_id, f"{origin}, local cache", minari_cache.read(dataset_id))
    folder = get_dataset_path(dataset_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and moved into place whole, so that a killed run leaves nothing that looks like data. One
    # process generates; the others wait and then read. A killed process releases its lock.
    staging = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        with contextlib.suppress(minari_cache.Unreadable):
            return Part(dataset_id, f"{origin}, local cache", minari_cache.read(dataset_id))
        damaged = folder.exists()
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with naming(folder):
                store_rollouts(staging, dataset_id, spec, policy_file, episodes)
                sync_files(staging)  # HDF5 has no checksums that would find out about a part lost in a power cut
                shutil.rmtree(folder, ignore_errors=True)
                staging.rename(folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    origin += ", generated again because the copy in the cache was damaged" if damaged else ", generated now"
    try:
        return Part(dataset_id, origin, minari_cache.read(dataset_id))
    except minari_cache.Unreadable as error:
        raise DatasetUnavailable(
            f"{folder} was generated now, and cannot be read ({error}).\n"
            "What to do: run again; if that does not help, set MINARI_DATASETS_PATH to a folder on another disk."
        ) from error
