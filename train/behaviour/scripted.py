"""Play episodes of OGBench's tasks with the scripted controllers that the package brings along.

OGBench's own data of these tasks were made by the same controllers with the same noise, so data made here stand in for
them where nothing can be downloaded. They are other episodes of the same kind: other random numbers were drawn.
The columns are those of OGBench's files. The last row of an episode is its final state; readers ignore its action.

Ants and humanoids walk by trained policies, which the package does not bring: of the mazes only the point's are here.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import itertools
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, ClassVar, TypeAlias

import gymnasium as gym
import numpy as np

Episode: TypeAlias = dict[str, np.ndarray]
"""The columns of one episode, of equal length."""

DTYPES: dict[str, type] = {
    "observations": np.float32,
    "actions": np.float32,
    "terminals": np.bool_,
    "qpos": np.float32,
    "qvel": np.float32,
    "button_states": np.int64,
}
"""All columns; ``button_states`` only where there are buttons. Positions, velocities and buttons precede the action."""

PLAN_NOISE = {"noise": 0.1, "noise_smoothing": 0.5}
MARKOV_STEP = {"min_norm": 0.4}
NOISE_SCALE = np.array([1, 1, 1, 3, 10])
"""Noise of the noisy data on x, y, z, yaw and gripper, in multiples of the episode's level."""
MOST_NOISE = 0.1
POINT_NOISE = 0.5
"""Standard deviation of the noise on the point's action, as in OGBench's commands; their ants have 0.2."""
STITCH_DISTANCE = 4


class CannotPlay(ValueError):
    """Episodes of that name cannot be generated; the message says why and what can be done."""


@dataclasses.dataclass(frozen=True)
class Recipe(abc.ABC):
    """How the episodes of one name are played."""

    env_id: str
    rows: int
    """Rows of an episode, one more than its transitions."""

    make_options: ClassVar[Mapping[str, Any]] = {"terminate_at_goal": False}

    @abc.abstractmethod
    def play(self, env: Any, rng: np.random.Generator, rows: int) -> Episode:
        """One episode. OGBench draws from NumPy's global generator too, which the caller has seeded."""

    def is_healthy(self, episode: Episode) -> bool:
        """Whether the simulation stayed sane; if not, the episode is played again with other random numbers."""
        return True


@dataclasses.dataclass(frozen=True)
class Tabletop(Recipe):
    """A robot arm that is given a new random target whenever it is done with one."""

    noisy: bool
    """Whether the controllers are closed-loop (Markov) under noise, instead of following plans."""
    stacking: tuple[float, float] = (0.0, 0.0)
    """Range of an episode's probability that a cube is to be put on another one."""
    random_actions: float = 0.0
    """Probability of a wholly random action."""

    make_options: ClassVar[Mapping[str, Any]] = {"terminate_at_goal": False, "mode": "data_collection"}

    def play(self, env: Any, rng: np.random.Generator, rows: int) -> Episode:
        controllers = self._controllers(env)
        p_stack = rng.uniform(*self.stacking)
        noise = rng.uniform(0, MOST_NOISE) * NOISE_SCALE
        # The first reset is insurance, for 2 ms: what an earlier episode left in the model (a lock's damping) could
        # otherwise reach this one through the solver's warm start. No case of it is known.
        env.reset(seed=0)
        ob, info = env.reset(seed=int(rng.integers(2**31)))
        controller = controllers[info["privileged/target_task"]]
        controller.reset(ob, info)
        episode = _Rows()
        for _ in range(rows):
            # The space's own sample() is of no use: the environment makes a new one, with a new seed, at every access.
            if rng.uniform() < self.random_actions:
                action = rng.uniform(-1, 1, len(NOISE_SCALE))
            else:
                action = controller.select_action(ob, info)
                if self.noisy:
                    action = action + rng.normal(0, noise)
            ob, info = episode.step(env, ob, action)
            if controller.done:
                # The step's info, which OGBench's script goes on with, tells of the old target. A Markov controller's
                # first action would depend on it, and for a drawer or window on what an earlier episode left behind.
                _, info = env.set_new_target(p_stack=p_stack)
                controller = controllers[info["privileged/target_task"]]
                controller.reset(ob, info)
        return episode.columns()

    def is_healthy(self, episode: Episode) -> bool:
        # OGBench checks scenes only. When the drawer locks while it moves with the cube inside, the simulation may
        # throw the cube out of it.
        if not self.env_id.startswith("scene"):
            return True
        y, z = episode["qpos"][:, 15], episode["qpos"][:, 16]
        in_drawer = (z >= 0.06) & (z <= 0.08)
        return not bool(((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any())

    def _controllers(self, env: Any) -> dict[str, Any]:
        """One controller per kind of object. OGBench also passes scenes' cubes a step limit, which has no effect."""
        style, options = ("markov", MARKOV_STEP) if self.noisy else ("plan", PLAN_NOISE)
        kinds = {"cube": ["cube"], "puzzle": ["button"], "scene": ["cube", "button", "drawer", "window"]}
        closed = {"gripper_always_closed": True} if self.env_id.startswith("puzzle") else {}
        controllers = {}
        for kind in kinds[self.env_id.partition("-")[0]]:
            module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{kind}_{style}")
            controller = getattr(module, f"{kind.title()}{style.title()}Oracle")
            controllers[kind] = controller(env=env, **options, **closed)
        return controllers


@dataclasses.dataclass(frozen=True)
class Maze(Recipe):
    """A point that walks towards its goal along the shortest path."""

    stitch: bool
    """Whether an episode has one goal near its start, instead of one goal after another anywhere."""

    def play(self, env: Any, rng: np.random.Generator, rows: int) -> Episode:
        free, vertices = _cells(env.maze_map)
        init = free[rng.integers(len(free))]
        goals = self._near(env, init) if self.stitch else vertices
        task = {"init_ij": init, "goal_ij": goals[rng.integers(len(goals))]}
        env.action_space.seed(int(rng.integers(2**31)))  # a reset takes random steps
        ob, _ = env.reset(seed=int(rng.integers(2**31)), options={"task_info": task})
        episode = _Rows()
        for _ in range(rows):
            xy = env.get_xy()
            way = env.get_oracle_subgoal(xy, env.cur_goal_xy)[0] - xy
            action = way / (np.linalg.norm(way) + 1e-6) + rng.normal(0, POINT_NOISE, 2)
            ob, info = episode.step(env, ob, action)
            if info["success"] and not self.stitch:
                # set_goal(cell) would do the same, and set the picture of the goal to NaN
                cell = vertices[rng.integers(len(vertices))]
                env.set_goal(goal_xy=env.add_noise(env.ij_to_xy(cell)))
        return episode.columns()

    def _near(self, env: Any, init: tuple[int, int]) -> list[tuple[int, int]]:
        """Cells at a path's distance; the start itself if there are none, as in a cell that is walled in."""
        xy = env.ij_to_xy(init)
        _, distances = env.get_oracle_subgoal(xy, xy)
        return [(int(i), int(j)) for i, j in np.argwhere(distances == STITCH_DISTANCE)] or [init]


class _Rows:
    """The rows of an episode while it is played."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = defaultdict(list)

    def step(self, env: Any, ob: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Clip the action, carry it out and add a row. The action is rounded first, so that the stored one replays."""
        action = np.clip(action, -1, 1).astype(np.float32)
        next_ob, _, _, _, info = env.step(action)
        row = {"observations": ob, "actions": action, "qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
        if "prev_button_states" in info:
            row["button_states"] = info["prev_button_states"]
        for column, value in row.items():
            self._values[column].append(value)
        return next_ob, info

    def columns(self) -> Episode:
        count = len(self._values["actions"])
        columns = {**self._values, "terminals": np.arange(count) == count - 1}
        return {column: np.array(columns[column], dtype) for column, dtype in DTYPES.items() if column in columns}


def _cells(maze: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The free cells of a maze, and those that are no mere corridor: corners, junctions and dead ends."""
    free = [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]

    def is_corridor(i: int, j: int) -> bool:
        up, down, left, right = (maze[cell] == 0 for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)))
        return up == down and left == right and up != left

    return free, [cell for cell in free if not is_corridor(*cell)]


STACKING = {
    "single": (0.0, 0.0),
    "double": (0.0, 0.25),
    "triple": (0.05, 0.35),
    "quadruple": (0.1, 0.5),
    "octuple": (0.0, 0.35),
}
PUZZLES = ("3x3", "4x4", "4x5", "4x6")
MAZES = ("medium", "large", "giant", "teleport")


def _recipes() -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}

    def add(task: str, stacking: tuple[float, float], random_actions: float) -> None:
        recipes[f"{task}-play"] = Tabletop(f"{task}-v0", 1001, noisy=False, stacking=stacking)
        recipes[f"{task}-noisy"] = Tabletop(f"{task}-v0", 1001, True, stacking, random_actions)

    for size, stacking in STACKING.items():
        add(f"cube-{size}", stacking, 0.1)
    add("scene", (0.0, 0.0), 0.1)
    for size in PUZZLES:
        add(f"puzzle-{size}", (0.0, 0.0), 0.2)
    for size in MAZES:
        rows = 2001 if size == "giant" else 1001
        recipes[f"pointmaze-{size}-navigate"] = Maze(f"pointmaze-{size}-v0", rows, stitch=False)
        recipes[f"pointmaze-{size}-stitch"] = Maze(f"pointmaze-{size}-v0", 201, stitch=True)
    return recipes


RECIPES = _recipes()
"""All names that can be generated. Lengths and probabilities are those of OGBench's commands, which have no noisy data
of eight cubes; here they are treated like those of four."""

KNOWN = ", ".join(
    [
        f"cube-{{{','.join(STACKING)}}}-{{play,noisy}}",
        "scene-{play,noisy}",
        f"puzzle-{{{','.join(PUZZLES)}}}-{{play,noisy}}",
        f"pointmaze-{{{','.join(MAZES)}}}-{{navigate,stitch}}",
    ]
)
"""The names of `RECIPES` in short."""


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        CannotPlay: there is none; the message suggests the nearest names.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.startswith(("antmaze", "antsoccer", "humanoidmaze")):
        reason = f"{name!r} needs a trained policy; OGBench's scripted controllers can move the arm and the point"
    elif name.startswith("visual-"):
        reason = f"{name!r} has images, and only states are generated"
    else:
        reason = f"there are no scripted controllers for {name!r}"
    nearest = difflib.get_close_matches(name.lower(), RECIPES, n=3)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    raise CannotPlay(f"{reason}.{hint} Can be generated: {KNOWN}.")


def check_installed() -> None:
    """Raise `CannotPlay` if OGBench is missing."""
    if importlib.util.find_spec("ogbench") is None:
        raise CannotPlay("OGBench's controllers are not installed: pip install -e '.[ogbench]'")


def play(name: str, seed: int, *, rows: int | None = None) -> Episode:
    """One episode. The same name and seed give the same bits, whatever was played before in this process.

    NumPy's global generator, which OGBench draws from, is left as it was.

    Args:
        name: a key of ``RECIPES``, such as ``cube-single-play``.
        seed: any integer that is not negative.
        rows: length of the episode; None: that of OGBench's data.

    Raises:
        CannotPlay: nothing can be generated under that name, or OGBench is not installed.
    """
    recipe = recipe_of(name)
    check_installed()
    with _global_generator_restored() as reseed:
        env = _environment(recipe)
        for attempt in itertools.count():
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(attempt,)))
            reseed(int(rng.integers(2**32)))
            episode = recipe.play(env, rng, rows or recipe.rows)
            if recipe.is_healthy(episode):
                return episode
    raise AssertionError("unreachable")


def serve(name: str, rows: int | None, seeds: Connection) -> None:
    """In a process of its own: play an episode for every seed that comes in, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            seeds.send(play(name, seeds.recv(), rows=rows))


@contextlib.contextmanager
def _global_generator_restored() -> Iterator[Callable[[int], None]]:
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield np.random.seed
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _environment(recipe: Recipe) -> Any:
    return _make(recipe.env_id, tuple(recipe.make_options.items()))


@functools.cache  # making one and its first reset take about as long as half an episode
def _make(env_id: str, options: tuple[tuple[str, Any], ...]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(DISPLAY|GLFW library is not initialized)")  # without a screen
        importlib.import_module("ogbench")  # registers its environments
        # without wrappers: episodes here have their own lengths
        return gym.make(env_id, disable_env_checker=True, **dict(options)).unwrapped
