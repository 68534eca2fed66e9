"""OGBench's single tasks (arXiv 2410.20092): mazes, cubes, scenes and puzzles, with states or images as observations.

A dataset such as cube-single-play knows no task. A task is a goal: OGBench's own code gives each recorded state its
reward, 0 where the goal is reached and less elsewhere, and nothing of value follows a state that has reached it.
Success is scored as OGBench scores it: an episode ends where the goal is reached.

Tasks whose names begin with "visual" have images of 64 x 64 pixels. Files of them are larger than most memories, so
their images are mapped from disk and stay there in 8 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from filelock import FileLock
from huggingface_hub import constants

from train.data import collected, goals, npz, published
from train.data.episode import Episode
from train.data.generated import episodes_of
from train.data.minari_cache import brief
from train.data.network import PROBE_SECONDS, problem_with
from train.data.spec import DatasetUnavailable, EnvSpec, NotHere, Part, Source, SuccessRate, Wanted
from train.data.unpacked import mapped
from train.rendering import render_off_screen
from train.simulator import Apart

VISUAL = "visual-"

SCENES = {
    "pointmaze": (("medium", "large", "giant", "teleport"), ("navigate", "stitch")),
    "antmaze": (("medium", "large", "giant", "teleport"), ("navigate", "stitch", "explore")),
    "humanoidmaze": (("medium", "large", "giant"), ("navigate", "stitch")),
    "antsoccer": (("arena", "medium"), ("navigate", "stitch")),
    "cube": (("single", "double", "triple", "quadruple", "octuple"), ("play", "noisy")),
    "scene": (("",), ("play", "noisy")),
    "puzzle": (("3x3", "4x4", "4x5", "4x6"), ("play", "noisy")),
    "visual-antmaze": (("medium", "large", "giant", "teleport"), ("navigate", "stitch", "explore")),
    "visual-humanoidmaze": (("medium", "large", "giant"), ("navigate", "stitch")),
    "visual-cube": (("single", "double", "triple", "quadruple"), ("play", "noisy")),
    "visual-scene": (("",), ("play", "noisy")),
    "visual-puzzle": (("3x3", "4x4", "4x5", "4x6"), ("play", "noisy")),
}
"""Sizes of each scene, and kinds of data."""
TASKS = ("", "-task1", "-task2", "-task3", "-task4", "-task5")
"""Without a number it is the scene's default task."""
COLUMNS = ("observations", "actions", "terminals", "qpos", "button_states")
# One thread of an Intel Xeon learns from an image in 2 to 11 ms, and renders one in 80 to 340 ms.
FEW = {"batch_size": 64, "log_every": 20, "eval_episodes": 2, "interim_episodes": 1}
SMALL_ON_IMAGES: Mapping[str, Mapping[str, Any]] = {
    "quick": {**FEW, "flow_warmup": 2_000, "critic_warmup": 400, "steps": 400, "eval_every": 400},
    "standard": {**FEW, "flow_warmup": 10_000, "critic_warmup": 2_000, "steps": 2_000, "eval_every": 2_000},
}
"""What the presets for CPUs change for images."""
FOLDER = Path("~/.ogbench/data")
"""Where OGBench itself keeps what it downloads."""


# -- the environments ------------------------------------------------------------------------------------------------


class Reproducible(Apart):
    """The same seed gives the same episode. OGBench draws from NumPy's global generator too, and its resets take random
    steps with actions from a space that nobody seeds; manipulation tasks make a new one for each. Manipulation tasks
    also do not say how many frames a second of a film has."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        task = env.unwrapped
        space = gym.spaces.Box(-1.0, 1.0, task.action_space.shape, np.float32)
        if isinstance(getattr(type(task), "action_space", None), property):
            task.__class__ = type(type(task).__name__, (type(task),), {"action_space": space})
        else:
            task.action_space = space
        self.action_space = space
        step = getattr(task, "_control_timestep", None)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / step)} if step else task.metadata
        # a property that simulates an observation each time
        observed = task.observation_space
        images = observed.dtype == np.uint8
        self.observation_space = observed if images else gym.spaces.Box(-np.inf, np.inf, observed.shape, np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            np.random.seed(seed % 2**32)  # noqa: NPY002
            self.action_space.seed(seed)
        return super().reset(seed=seed, options=options)


def make(env_id: str, **options: Any) -> gym.Env:
    if env_id.startswith(VISUAL):
        render_off_screen()
    with warnings.catch_warnings():
        # the package looks for a screen, and gives bounds of actions in float64
        warnings.filterwarnings("ignore", message=".*(DISPLAY|GLFW library is not initialized)")
        warnings.filterwarnings("ignore", message=".*precision lowered by casting", module="gymnasium")
        import ogbench  # noqa: F401, registers the environments

        return Reproducible(gym.make(env_id, disable_env_checker=True, **options))


# -- the data --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """OGBench's own file of a dataset, downloaded by its package if it is not here."""

    dataset: str
    task: str
    """OGBench's id of the environment, which knows the goal."""

    def __str__(self) -> str:
        return f"OGBench's {self.dataset}"

    @property
    def path(self) -> Path:
        return FOLDER.expanduser() / f"{self.dataset}.npz"

    def is_cached(self, wanted: Wanted) -> bool:
        return self.path.exists()

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        origin = "OGBench, local file"
        if not self.path.exists():
            problem = self._download() if wanted.download else "not looked for"
            if problem is not None:
                raise NotHere(
                    problem,
                    tried=(f"local file: there is no {self.path}", f"download: {problem}"),
                    remedy=f"copy {self.dataset}.npz into {self.path.parent}.",
                )
            origin = "OGBench, downloaded now"
        try:
            columns = {"observations": images(self.path)} if self.dataset.startswith(VISUAL) else {}
            columns |= npz.read(self.path, [name for name in COLUMNS if name not in columns])
            episodes = of_task(columns, self.task)
        except OSError as error:
            if error.errno is None:  # NumPy's, about what the file holds
                raise self._damaged(error) from error
            raise DatasetUnavailable(f"{self.path} cannot be read or unpacked beside itself: {error}") from error
        except (ValueError, IndexError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise self._damaged(error) from error
        return [Part(self.dataset, origin, episodes)]

    def _damaged(self, error: Exception) -> DatasetUnavailable:
        return DatasetUnavailable(
            f"{self.path} cannot be read ({brief(error)}).\n"
            "What to do: delete the file and run again to have it downloaded."
        )

    def _download(self) -> str | None:
        """Have OGBench download the file; returns what went wrong, or None."""
        from urllib import request

        from ogbench import utils

        server = utils.DATASET_URL
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE forbids downloads"
        head = request.Request(f"{server}/{self.path.name}", method="HEAD")
        problem = problem_with(server, lambda: request.urlopen(head, timeout=PROBE_SECONDS).status)
        if problem is not None:
            return problem
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):  # two runs would write into the same file
            try:
                if not self.path.exists():
                    utils.download_datasets([self.dataset], str(self.path.parent))
            except Exception as error:  # whatever the network or the disk comes up with
                # the file for validation comes second, and is not needed
                return None if self.path.exists() else f"failed ({brief(error)})"
        return None


@dataclasses.dataclass(frozen=True)
class Collected(Source):
    """Episodes of OGBench's scripted controllers, generated on this machine (``train/collect.py``)."""

    dataset: str
    task: str

    def __str__(self) -> str:
        return f"episodes of OGBench's scripted controllers for {self.name}"

    @property
    def name(self) -> str:
        return self.dataset.removesuffix("-v0")

    def is_cached(self, wanted: Wanted) -> bool:
        return collected.can_collect(self.name) and collected.is_collected(self.name, episodes_of(wanted.size))

    def whereabouts(self, wanted: Wanted) -> str:
        return f"there are {self} in {collected.parts(self.name, 1)[0].parent}"

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        if not collected.can_collect(self.name):
            visual = self.name.startswith(VISUAL)
            reason = "only states are generated" if visual else "OGBench has no scripted controller for it"
            raise NotHere(reason, tried=[f"generate: {reason}"])
        episodes = episodes_of(wanted.size)
        origin = "scripted controllers, " + ("local files" if self.is_cached(wanted) else "generated now")
        try:
            columns = self._columns(episodes)
        except (ChildProcessError, collected.Unreadable) as error:
            raise DatasetUnavailable(f"{self.name} cannot be generated: {error}") from error
        try:
            found = of_task(columns, self.task)
        except (ValueError, IndexError) as error:
            folder = collected.parts(self.name, 1)[0].parent
            raise DatasetUnavailable(f"the files in {folder} are not {self} ({brief(error)}): delete them") from error
        return [Part(f"fdkernels/{self.name}-{episodes}ep-v0", origin, found)]

    def _columns(self, episodes: int) -> dict[str, np.ndarray]:
        with contextlib.suppress(collected.Unreadable):  # `collect` would unpack all parts to check them
            return collected.read(self.name, episodes)
        collected.collect(self.name, episodes)
        return collected.read(self.name, episodes)


def images(path: Path) -> np.ndarray:
    """The observations of a visual dataset, (N, height, width, channels) uint8, mapped into memory.

    Raises:
        ValueError: they are something else.
    """
    found = mapped(path, "observations")
    if found.dtype != np.uint8 or found.ndim != 4:
        raise ValueError(f"its observations are {found.dtype} of shape {found.shape}, not images of 8 bits")
    return found


def of_task(columns: dict[str, np.ndarray], task: str) -> list[Episode]:
    """Episodes with the rewards of a task, from the columns of an OGBench file.

    Args:
        columns: observations (N, obs_dim) or images, actions (N, d), terminals (N,), which mark the last row of each
            episode, qpos (N, nq), and button_states (N, buttons) if the scene has any. A last row is a final state; its
            action is not used.
        task: OGBench's id of the environment.

    Raises:
        ValueError: a column is missing, too short or no table, or the last episode has no end.
        IndexError: a row of qpos is not a state of the environment.
    """
    needed = COLUMNS if "scene" in task or "puzzle" in task else COLUMNS[:-1]
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name in needed:
        if columns[name].ndim not in ({1} if name == "terminals" else {2, 4} if name == "observations" else {2}):
            raise ValueError(f"its {name} have the shape {columns[name].shape}")
    lengths = {name: len(columns[name]) for name in needed}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its columns have different lengths: {lengths}")
    ends = np.flatnonzero(columns["terminals"])
    if not len(ends) or ends[-1] != len(columns["terminals"]) - 1:
        raise ValueError(f"episode {len(ends)} has no end: the last row is not marked as terminal")
    broken = np.flatnonzero(~np.isfinite(columns["qpos"]).all(1))
    if len(broken):  # such a state would count as one that has not reached the goal
        raise ValueError(f"episode {np.searchsorted(ends, broken[0])} has NaN or infinity in its qpos")
    rewards, masks = _rewards(columns, task)
    episodes = []
    for start, end in zip([0, *(ends[:-1] + 1)], ends):
        steps = slice(start, end)
        success = not masks[start : end + 1].all()
        observations = columns["observations"][start : end + 1]
        episodes.append(Episode(observations, columns["actions"][steps], rewards[steps], masks[steps], success))
    return episodes


def _rewards(columns: dict[str, np.ndarray], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and masks of all rows, by OGBench's own code."""
    from ogbench.relabel_utils import relabel_dataset

    # the goal is the same with states, and nothing is rendered
    env = make(task.removeprefix(VISUAL))
    try:
        relabelled = dict(columns)
        relabel_dataset(task, env, relabelled)
    finally:
        env.close()
    return relabelled["rewards"], relabelled["masks"].astype(bool)


def preset_changes(name: str, preset: str, agent: str, online: bool) -> Mapping[str, Any]:
    settings = {**goals.changes(name, preset, agent, online), **published.changes(name, preset, agent, online)}
    if not name.startswith(VISUAL):
        return settings
    return {**published.PIXELS, **SMALL_ON_IMAGES.get(preset, {}), "standardize_observations": False, **settings}


def _rows() -> Iterator[EnvSpec]:
    for scene, (sizes, kinds) in SCENES.items():
        for size, kind, task in itertools.product(sizes, kinds, TASKS):
            place = f"{scene}-{size}" if size else scene
            name, task_id = f"{place}-{kind}-singletask{task}-v0", f"{place}-singletask{task}-v0"
            dataset, env_id = f"{place}-{kind}-v0", f"fdkernels/{task_id}"
            if env_id not in gym.registry:
                gym.register(env_id, f"{__name__}:make", disable_env_checker=True, kwargs={"env_id": task_id})
            yield EnvSpec(
                name=name,
                env_id=env_id,
                sources=(Files(dataset, task_id), Collected(dataset, task_id)),
                scoring=SuccessRate(),
                preset_changes=functools.partial(preset_changes, name),
                needs=("ogbench", "ogbench"),
            )


ENVIRONMENTS = tuple(_rows())
