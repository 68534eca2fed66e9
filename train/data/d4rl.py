"""D4RL's AntMaze and Adroit tasks: Minari's data, played in gymnasium-robotics (``pip install -e '.[d4rl]'``).

AntMaze. An ant walks from a fixed cell of a maze to the goal in another. As in D4RL it sees 29 numbers, the position
and Minari's 27, but not the goal, for there is only one: D4RL labelled all its data with the goal of the evaluation,
whatever goal the ant was following when it was recorded (its relabel_antmaze_rewards.py). Minari's recordings have
rewards for the goals that were followed, and these vary from episode to episode; so they are labelled anew here.
The reward is −1 a step until the goal is reached and 0 there, where the value ends: D4RL's 0 or 1 less one, as IQL and
FQL have it.

Adroit. A hand turns a pen, opens a door, hammers a nail, or moves a ball. Evaluation has D4RL's time limits, and ends
where the pen drops, as in D4RL and unlike in gymnasium-robotics.

Kitchen is missing. gymnasium-robotics 1.4.2 cannot make FrankaKitchen-v1 under MuJoCo 4, where an assertion about the
types of joints fails (``joint_type in (mjJNT_HINGE, mjJNT_SLIDE)`` is False for NumPy's integers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from minari import EpisodeData

from train.data import goals, published
from train.data.episode import Episode
from train.data.hosted import Hosted
from train.data.spec import EnvSpec, NormalizedReturn, Part, SuccessRate, Wanted

NEEDS = ("gymnasium_robotics", "d4rl")


def find_simulator() -> None:
    """Import gymnasium-robotics without the notice that it prints: `WRONG_SIGN` says the same where it matters."""
    with contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(NEEDS[0])


@dataclasses.dataclass(frozen=True)
class Recordings(Hosted):
    """Minari's version of a dataset of D4RL."""

    note: str = ""
    """How it differs from D4RL's."""

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        return [part._replace(note=self.note) for part in super().load(spec, wanted)]


# --- AntMaze ----------------------------------------------------------------------------------------------------------

CELL = 4.0
"""Width of a maze's cells, in metres."""
RADIUS = 0.5
"""Distance from the goal at which it is reached, D4RL's (goal_reaching_env.py). gymnasium-robotics has 0.45."""


@dataclasses.dataclass(frozen=True)
class Maze:
    rows: tuple[str, ...]
    """Walls #, the start's cell r and the goal's cell g."""
    steps: int
    """Time limit of the evaluation, D4RL's."""

    @property
    def cells(self) -> list[list[int | str]]:
        """As gymnasium-robotics has them."""
        return [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in self.rows]

    @functools.cached_property
    def goal(self) -> np.ndarray:
        """Centre of the goal's cell, (2,), in metres from the centre of the maze."""
        ((row, column),) = [(i, row.index("g")) for i, row in enumerate(self.rows) if "g" in row]
        return CELL * np.array([column + 0.5 - len(self.rows[0]) / 2, len(self.rows) / 2 - row - 0.5])

    def reached(self, positions: np.ndarray) -> np.ndarray:
        """Whether positions (..., 2) are at the goal."""
        return np.linalg.norm(positions - self.goal, axis=-1) <= RADIUS


# D4RL's *_TEST maps (d4rl/locomotion/maze_env.py). Minari's are the same, except that y falls from row to row, so that
# they are mirror images; and that in the U start and goal have changed places. These are also the maps that Minari's
# metadata give for evaluation, except for the U, where theirs opens to the side where all the recordings have a wall.
MAZES = {
    "umaze": Maze(("#####", "#g..#", "###.#", "#r..#", "#####"), 700),
    "medium": Maze(
        ("########", "#r.##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.g#", "########"), 1000
    ),
    "large": Maze(
        (
            "############",
            "#r...#.....#",
            "#.##.#.#.#.#",
            "#......#...#",
            "#.####.###.#",
            "#..#.#.....#",
            "##.#.#.#.###",
            "#..#...#.g.#",
            "############",
        ),
        1000,
    ),
}
ANTMAZES = {
    "umaze": ["umaze", "umaze-diverse"],
    "medium": ["medium-play", "medium-diverse"],
    "large": ["large-play", "large-diverse"],
}
ANTMAZE_NOTE = (
    "not D4RL's recordings but Minari's, of a stronger ant (torques up to 150, not 30; 0.05 s a step, not 0.1) that "
    "followed other goals; reward and success are computed for the evaluation's goal, as in D4RL. It is the centre of "
    "D4RL's goal cell, where D4RL-v2 draws a point for each episode"
)


def flat(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """What D4RL's agents see, (..., 29): the position, then the rest of the ant's state."""
    return np.concatenate([observation["achieved_goal"], observation["observation"]], axis=-1)


def antmaze_episode(stored: EpisodeData, maze: Maze) -> Episode:
    """A recording, labelled with the goal of the evaluation. It goes on after that is reached."""
    reached = maze.reached(stored.observations["achieved_goal"][1:])
    masks = np.logical_not(reached | stored.terminations)
    observations = flat(stored.observations).astype(np.float32)  # half the memory for a million steps
    return Episode(observations, stored.actions, reached - 1.0, masks, bool(reached.any()))


class ToTheGoal(gym.Wrapper):
    """AntMaze with a goal that stays where it is and ends the episode, and with flat observations."""

    def __init__(self, env: gym.Env, maze: Maze) -> None:
        super().__init__(env)
        self.maze = maze
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        env: Any = self.env.unwrapped
        env.goal = self.maze.goal.copy()  # the environment has drawn a point near it
        env.update_target_site_pos()
        return flat(observation), {**info, "success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, _, _, _, info = self.env.step(action)
        reached = bool(self.maze.reached(observation["achieved_goal"]))
        return flat(observation), reached - 1.0, reached, False, {**info, "success": reached}


def make_antmaze(maze: str, **options: Any) -> gym.Env:
    find_simulator()
    from gymnasium_robotics.envs.maze.ant_maze_v4 import AntMazeEnv  # Minari's recordings are of v4

    # The start is the environment's own, up to a metre from the centre of its cell in x and y, as in the recordings.
    env = AntMazeEnv(maze_map=MAZES[maze].cells, **options)
    Path(env.tmp_xml_file_path).unlink()  # read by now, and otherwise one is left behind for each environment
    return ToTheGoal(env, MAZES[maze])


# --- Adroit -----------------------------------------------------------------------------------------------------------

# Time limits and reference returns from D4RL (d4rl/hand_manipulation_suite/__init__.py and infos.py).
ADROIT = {
    "pen": (100, 96.262799, 3076.8331017826877),
    "door": (200, -56.512833, 2880.5693087298737),
    "hammer": (200, -274.856578, 12794.134825156867),
    "relocate": (200, -6.425911, 4233.877797728884),
}
QUALITIES = ("human", "cloned", "expert")
REPLAYED = "D4RL's actions, replayed by Minari in gymnasium-robotics; episodes can be longer than the evaluation's {}"
# gymnasium-robotics' pull request 220: a term 0.1·‖hand − object‖, up to half a point of the score in all
WRONG_SIGN = "its reward grows with the hand's distance from the object, D4RL's falls (less than a point of the score)"
PEN_HEIGHT, DROPPED = 26, 0.075
"""Where observations have the height of the pen, and the height below which D4RL ends the episode (pen_v0.py)."""


def dropped(observations: np.ndarray) -> np.ndarray:
    return observations[..., PEN_HEIGHT] < DROPPED


def pen_episode(stored: EpisodeData) -> Episode:
    """A recording whose value ends where the evaluation would. It goes on after the drop."""
    masks = np.logical_not(dropped(stored.observations[1:]) | stored.terminations)
    return Episode(stored.observations, stored.actions, stored.rewards, masks)


class EndsAtDrop(gym.Wrapper):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated or bool(dropped(observation)), truncated, info


def make_adroit(task: str, **options: Any) -> gym.Env:
    find_simulator()
    # v1 is what the recordings are of. Without a time limit, because the environment around this one has it.
    env = gym.make(f"{NEEDS[0]}:AdroitHand{task.capitalize()}-v1", max_episode_steps=-1, **options)
    return EndsAtDrop(env) if task == "pen" else env


# --- The rows ---------------------------------------------------------------------------------------------------------


def _registered(env_id: str, make: str, steps: int, **options: str) -> str:
    if env_id not in gym.registry:
        gym.register(env_id, f"{__name__}:{make}", max_episode_steps=steps, kwargs=options)
    return env_id


def antmaze_changes(name: str, preset: str, agent: str, online: bool) -> Mapping[str, Any]:
    return {**goals.changes(name, preset, agent, online), **published.changes(name, preset, agent, online)}


def _antmazes() -> Iterator[EnvSpec]:
    for maze, datasets in ANTMAZES.items():
        convert = functools.partial(antmaze_episode, maze=MAZES[maze])
        title = "UMaze" if maze == "umaze" else maze.capitalize()
        env_id = _registered(f"fdkernels/D4RLAntMaze{title}-v0", "make_antmaze", MAZES[maze].steps, maze=maze)
        for dataset in datasets:
            yield EnvSpec(
                name=f"antmaze-{dataset}",
                env_id=env_id,
                sources=(Recordings((f"D4RL/antmaze/{dataset}-v1",), convert, ANTMAZE_NOTE),),
                scoring=SuccessRate(),  # D4RL's normalised score of one 0-or-1 reward
                preset_changes=functools.partial(antmaze_changes, f"antmaze-{dataset}"),
                needs=NEEDS,
            )


def _adroit() -> Iterator[EnvSpec]:
    for task, (steps, random_return, expert_return) in ADROIT.items():
        env_id = _registered(f"fdkernels/D4RL{task.capitalize()}-v0", "make_adroit", steps, task=task)
        note = REPLAYED.format(steps) + ("" if task == "pen" else f"; {WRONG_SIGN}")
        source = Recordings((), note=note)
        source = dataclasses.replace(source, convert=pen_episode) if task == "pen" else source
        for quality in QUALITIES:
            yield EnvSpec(
                name=f"{task}-{quality}",
                env_id=env_id,
                sources=(dataclasses.replace(source, dataset_ids=(f"D4RL/{task}/{quality}-v2",)),),
                scoring=NormalizedReturn(random_return, expert_return),
                preset_changes=functools.partial(published.changes, f"{task}-{quality}"),
                needs=NEEDS,
            )


ENVIRONMENTS = (*_antmazes(), *_adroit())
