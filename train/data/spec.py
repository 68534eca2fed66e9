"""The parts of a family of environments: rows of `EnvSpec`, and the `Source`s of their data."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from train.data.episode import Episode, Outcomes

Size = Literal["default", "full"] | int
PresetChanges: TypeAlias = Callable[[str, str, bool], Mapping[str, Any]]


def no_changes(preset: str, agent: str, online: bool) -> Mapping[str, Any]:
    """Leave the presets as they are."""
    return {}


@dataclasses.dataclass(frozen=True)
class NormalizedReturn:
    """Returns on a scale from 0, a random policy's, to 100, the expert's, as in D4RL."""

    random: float
    expert: float
    name: ClassVar[str] = "D4RL-normalised score"

    def __call__(self, outcomes: Outcomes) -> np.ndarray:
        return 100 * (outcomes.returns - self.random) / (self.expert - self.random)

    @property
    def legend(self) -> str:
        return f"0 = random ({self.random:,.0f}), 100 = expert ({self.expert:,.0f})"


@dataclasses.dataclass(frozen=True)
class SuccessRate:
    """The percentage of episodes that reach the goal."""

    name: ClassVar[str] = "success rate"

    def __call__(self, outcomes: Outcomes) -> np.ndarray:
        return 100.0 * outcomes.successes

    @property
    def legend(self) -> str:
        return "per cent of episodes that reach the goal"


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """An environment and the sources of its data."""

    name: str
    """The name for ``--env``."""
    env_id: str
    """Gymnasium id for evaluation. It needs a time limit and actions in [-1, 1], and reports success as
    ``info["success"]`` if that is what scores. A family may register its own."""
    sources: tuple[Source, ...]
    """Sources of its data, the preferred one first."""
    scoring: NormalizedReturn | SuccessRate
    """Maps the `Outcomes` of episodes to their scores."""
    preset_changes: PresetChanges = no_changes
    """Maps names of a preset and an agent, and whether the run goes online, to the settings and hyper-parameters that
    this environment changes."""
    camera: str | None = None
    """MuJoCo camera for films; None: the environment's own camera and size."""
    needs: tuple[str, str] | None = None
    """A package that has the environment, and the extra of this project that installs it."""

    def check_installed(self) -> None:
        """Raises `NotInstalled` if the environment's package is missing."""
        if self.needs is not None and importlib.util.find_spec(self.needs[0]) is None:
            raise NotInstalled(f"{self.name} needs {self.needs[0]}: pip install -e '.[{self.needs[1]}]'")

    @property
    def score_label(self) -> str:
        return f"{self.scoring.name} ({self.env_id.removeprefix('fdkernels/')})"


class Wanted(NamedTuple):
    """A request for data; each source uses the fields that concern it."""

    size: Size
    """Size of generated data: the usual one, the published one, or a number of episodes."""
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
    episodes: Sequence[Episode]
    note: str = ""
    """How the data differ from what their name suggests, for display."""


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


class NotInstalled(RuntimeError):
    """A package that an environment needs is missing; the message says how to install it."""


class DatasetUnavailable(RuntimeError):
    """There is no data to learn from; the message says what was tried and what to do."""
