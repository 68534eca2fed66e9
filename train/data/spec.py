"""The parts of a family of environments: rows of `EnvSpec`, and the `Source`s of their data."""

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
    """Leave the presets as they are."""
    return {}


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """An environment and the sources of its data."""

    name: str
    """The name for ``--env``."""
    env_id: str
    """Gymnasium id for evaluation. It needs a time limit and actions in [-1, 1]; a family may register its own."""
    sources: tuple[Source, ...]
    """Sources of its data, the preferred one first."""
    random_return: float
    """Return that scores 0."""
    expert_return: float
    """Return that scores 100."""
    score_name: str = "D4RL-normalised score"
    """Name of the score in tables and pictures."""
    preset_changes: PresetChanges = no_changes
    """Maps names of a preset and an agent to the settings and hyper-parameters that this environment changes."""
    camera: str | None = None
    """MuJoCo camera for films; None: the environment's own camera and size."""

    @property
    def score_label(self) -> str:
        return f"{self.score_name} ({self.env_id})"


def normalized_score(spec: EnvSpec, returns: Returns) -> Returns:
    """Scale returns so that a random policy scores 0 and the expert 100, as in D4RL."""
    return 100 * (returns - spec.random_return) / (spec.expert_return - spec.random_return)


class Wanted(NamedTuple):
    """A request for data; each source uses the fields that concern it."""

    size: Size
    """Size of generated data."""
    download: bool
    """Whether a source may download."""
    policies: Path
    """Folder of the behaviour policies."""
    environments: Sequence[EnvSpec]
    """All environments, so that a source can name those that it has data for."""


class Part(NamedTuple):
    """Whole episodes from one dataset."""

    dataset_id: str
    origin: str
    """Where the data came from, for display."""
    episodes: Sequence[EpisodeData]
    """Any objects with observations (one more than actions), actions, rewards and terminations."""


class Source(abc.ABC):
    """A place that an environment's data can come from. ``str()`` names it for display."""

    @abc.abstractmethod
    def is_cached(self, wanted: Wanted) -> bool:
        """Whether all of its data are on this machine. The first source that says yes is loaded; no other is."""

    @abc.abstractmethod
    def load(self, spec: EnvSpec, wanted: Wanted) -> Sequence[Part]:
        """Read the data, downloading or generating it first if needed.

        Raises:
            NotHere: this source has no data for the environment; the next one is tried.
            DatasetUnavailable: it should have data, but there is a problem that the user must fix.
        """

    def whereabouts(self, wanted: Wanted) -> str:
        """Where the cached data are; shown to explain why a preferred source was not tried."""
        return f"there is {self}"


class NotHere(Exception):
    """A source has no data for an environment; the message is a short reason.

    Args:
        reason: the reason in a few words.
        tried: lines to show if no other source has data either.
        remedy: what the user can do about it.
    """

    def __init__(self, reason: str, tried: Sequence[str], remedy: str = "") -> None:
        super().__init__(reason)
        self.tried, self.remedy = tried, remedy


class DatasetUnavailable(RuntimeError):
    """There is no data to learn from; the message says what was tried and what to do."""
