"""Load an environment's transitions from the first of its sources that has data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.behaviour.policy import POLICIES
from train.data.episode import BadEpisode, check_episodes, outcomes_of
from train.data.spec import DatasetUnavailable, EnvSpec, NotHere, Part, Size, Wanted
from train.data.transitions import OfflineDataset
from train.environments import ENVIRONMENTS


def load_dataset(
    spec: EnvSpec, *, size: Size = "default", download: bool = True, policies: Path = POLICIES
) -> OfflineDataset:
    """Read the data of an environment, downloading or generating it first if needed.

    A source whose data are already on this machine takes precedence, so that a resumed run keeps its data when the
    network comes or goes. Otherwise the sources are tried in order. All parts of a combined dataset come from the same
    source.

    Args:
        spec: a row of ``train.environments.ENVIRONMENTS``.
        size: size of generated data, ``train.data.generated.EPISODES`` of each policy, or a number of episodes. Hosted
            datasets are always whole.
        download: whether to download hosted datasets that are not in the local cache.
        policies: folder of the behaviour policies.

    Raises:
        DatasetUnavailable: no source has data, or the data are damaged.
        NotInstalled: the environment needs a package that is missing.
        OSError: data could not be read or written; what is there is left as it is.
    """
    spec.check_installed()
    wanted = Wanted(size, download, policies, tuple(ENVIRONMENTS.values()))
    cached = next((source for source in spec.sources if source.is_cached(wanted)), None)
    preface, failures = [], []
    for source in spec.sources:
        if cached is not None and source is not cached:
            preface.append(f"{source}: not looked for, {cached.whereabouts(wanted)}")
            continue
        try:
            return _combine(spec, source.load(spec, wanted), preface)
        except NotHere as failure:
            preface.append(f"{source}: {failure}")
            failures.append(failure)
    lines = [f"no data for {spec.name}.", *(f"  {line}" for failure in failures for line in failure.tried)]
    remedies = " ".join(failure.remedy for failure in failures if failure.remedy)
    raise DatasetUnavailable("\n".join([*lines, f"What to do: {remedies}"] if remedies else lines))


def _combine(spec: EnvSpec, parts: Sequence[Part], preface: Sequence[str]) -> OfflineDataset:
    lines = list(preface)
    for dataset_id, origin, episodes, note in parts:
        try:
            check_episodes(episodes)
        except BadEpisode as error:
            raise DatasetUnavailable(f"{dataset_id} ({origin}): {error}") from error
        transitions = sum(len(e.rewards) for e in episodes)
        outcomes = outcomes_of(episodes)
        lines.append(
            f"{dataset_id} ({origin}): {len(episodes):,} episodes, {transitions:,} transitions, mean return "
            f"{outcomes.returns.mean():,.0f}, score {spec.scoring(outcomes).mean():.1f}"
        )
        lines += [note] if note else []
    ids = tuple(part.dataset_id for part in parts)
    return OfflineDataset.from_episodes([e for part in parts for e in part.episodes], ids, tuple(lines))
