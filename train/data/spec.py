"""What a family of environments consists of: rows of `EnvSpec`, with the `Source`s of their data."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    from minari import EpisodeData

Size = Literal["default", "full"]
Returns = TypeVar("Returns", float, np.ndarray)
PresetChanges: TypeAlias = Callable[[str, str], Mapping[str, Any]]


def no_changes(preset: str, agent: str) -> Mapping[str, Any]:
    """The presets as they are."""
    return {}


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """An environment together with the data that it is learned from."""

    name: str
    """What people type for ``--env``."""
    env_id: str
    """Gymnasium id, for evaluation, with a time limit and actions in [-1, 1]. A family may register its own."""
    sources: tuple[Source, ...]
    """Where its data can come from, the preferred one first."""
    random_return: float
    """Return that scores 0."""
    expert_return: float
    """Return that scores 100."""
    score_name: str = "D4RL-normalised score"
    """What tables and pictures call that score."""
    preset_changes: PresetChanges = no_changes
    """Given a preset's and an agent's name, the settings and hyper-parameters in which that preset differs here."""
    camera: str | None = None
    """MuJoCo's camera for films; None: size and camera are the environment's own."""

    @property
    def score_label(self) -> str:
        return f"{self.score_name} ({self.env_id})"


def normalized_score(spec: EnvSpec, returns: Returns) -> Returns:
    """0 at the return of a random policy, 100 at the expert's, as in D4RL."""
    return 100 * (returns - spec.random_return) / (spec.expert_return - spec.random_return)


class Wanted(NamedTuple):
    """What is asked of a source; each heeds what concerns it."""

    size: Size
    """Of generated data."""
    download: bool
    """Whether to look beyond the local cache."""
    policies: Path
    """Folder of the behaviour policies."""
    environments: Sequence[EnvSpec]
    """Every environment there is, to name those for which a source has data."""


class Part(NamedTuple):
    """Whole episodes from one dataset."""

    dataset_id: str
    origin: str
    """For people: where it came from."""
    episodes: Sequence[EpisodeData]
    """Or anything with their observations (one more than actions), actions, rewards and terminations."""


class Source(abc.ABC):
    """A place that an environment's data can come from. Its text names it for people."""

    @abc.abstractmethod
    def is_cached(self, wanted: Wanted) -> bool:
        """Whether all of it is on this machine. If so, later sources are not asked, and earlier ones only this."""

    @abc.abstractmethod
    def load(self, spec: EnvSpec, wanted: Wanted) -> Sequence[Part]:
        """Read the data, getting it first if need be.

        Raises:
            NotHere: this source has no data for the environment; the next one is asked.
            DatasetUnavailable: it should have, but something is wrong that people must mend.
        """

    def whereabouts(self, wanted: Wanted) -> str:
        """Where cached data are, for people who wonder why no better source was asked."""
        return f"there is {self}"


class NotHere(Exception):
    """A source has nothing for an environment; the message is a short reason.

    Args:
        reason: in a few words.
        tried: lines for people, should no other source have anything either.
        remedy: what they can do about it.
    """

    def __init__(self, reason: str, tried: Sequence[str], remedy: str = "") -> None:
        super().__init__(reason)
        self.tried, self.remedy = tried, remedy


class DatasetUnavailable(RuntimeError):
    """There is no data to learn from; the message says what was tried and what to do."""
