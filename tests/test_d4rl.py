"""D4RL's tasks: Minari's recordings as D4RL's agents see them, and an evaluation that agrees with them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from train.data import d4rl, hosted
from train.data.episode import Outcomes
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable, NotInstalled
from train.environments import ENVIRONMENTS, UnknownEnvironment, resolve
from train.evaluate import run_episodes
from train.simulator import kept_vector_env

IDS = {
    "antmaze-umaze": ("D4RL/antmaze/umaze-v1", "fdkernels/D4RLAntMazeUMaze-v0", 700),
    "antmaze-umaze-diverse": ("D4RL/antmaze/umaze-diverse-v1", "fdkernels/D4RLAntMazeUMaze-v0", 700),
    "antmaze-medium-play": ("D4RL/antmaze/medium-play-v1", "fdkernels/D4RLAntMazeMedium-v0", 1000),
    "antmaze-medium-diverse": ("D4RL/antmaze/medium-diverse-v1", "fdkernels/D4RLAntMazeMedium-v0", 1000),
    "antmaze-large-play": ("D4RL/antmaze/large-play-v1", "fdkernels/D4RLAntMazeLarge-v0", 1000),
    "antmaze-large-diverse": ("D4RL/antmaze/large-diverse-v1", "fdkernels/D4RLAntMazeLarge-v0", 1000),
    "pen-human": ("D4RL/pen/human-v2", "fdkernels/D4RLPen-v0", 100),
    "pen-cloned": ("D4RL/pen/cloned-v2", "fdkernels/D4RLPen-v0", 100),
    "pen-expert": ("D4RL/pen/expert-v2", "fdkernels/D4RLPen-v0", 100),
    "door-human": ("D4RL/door/human-v2", "fdkernels/D4RLDoor-v0", 200),
    "door-cloned": ("D4RL/door/cloned-v2", "fdkernels/D4RLDoor-v0", 200),
    "door-expert": ("D4RL/door/expert-v2", "fdkernels/D4RLDoor-v0", 200),
    "hammer-human": ("D4RL/hammer/human-v2", "fdkernels/D4RLHammer-v0", 200),
    "hammer-cloned": ("D4RL/hammer/cloned-v2", "fdkernels/D4RLHammer-v0", 200),
    "hammer-expert": ("D4RL/hammer/expert-v2", "fdkernels/D4RLHammer-v0", 200),
    "relocate-human": ("D4RL/relocate/human-v2", "fdkernels/D4RLRelocate-v0", 200),
    "relocate-cloned": ("D4RL/relocate/cloned-v2", "fdkernels/D4RLRelocate-v0", 200),
    "relocate-expert": ("D4RL/relocate/expert-v2", "fdkernels/D4RLRelocate-v0", 200),
}
MAPS = {"umaze": "U_MAZE", "medium": "MEDIUM_MAZE", "large": "LARGE_MAZE"}
STARTS = {"umaze": (3, 1), "medium": (1, 1), "large": (1, 1)}  # row and column
GOALS = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}
WIDTHS = {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """An empty Minari cache, no network, and a temporary folder, in which AntMaze leaves its models."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(hosted, "_hub_problem", lambda: "the hub cannot be reached")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def robotics():
    return pytest.importorskip("gymnasium_robotics")


def record(dataset_id: str, env: gym.Env, disturb: Callable[[Any, int], None]) -> list[np.ndarray]:
    """Store an episode of random actions as Minari stores its own; ``disturb(env, t)`` may change the state before
    step t. Returns the simulator's positions and velocities before each step."""
    rng, bare, states, truncated = np.random.default_rng(7), env.unwrapped, [], False
    observations, actions, ends = [env.reset(seed=5)[0]], [], []
    while not truncated:
        disturb(bare, len(actions))
        states.append(np.concatenate([bare.data.qpos, bare.data.qvel]))
        actions.append(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        ends.append((reward, terminated, truncated))
    keys = observations[0].keys() if isinstance(observations[0], dict) else None
    stacked = {key: np.stack([o[key] for o in observations]) for key in keys} if keys else np.stack(observations)
    rewards, terminations, truncations = map(np.array, zip(*ends))
    episode = EpisodeBuffer(
        observations=stacked, actions=np.stack(actions), rewards=rewards, terminations=terminations,
        truncations=truncations,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a published dataset should also have
        minari.create_dataset_from_buffers(dataset_id, [episode], env=env)
    env.close()
    return states


def place(env: Any, position: np.ndarray) -> None:
    """Move the ant of an AntMaze environment, and leave it as it is otherwise."""
    ant = env.unwrapped.ant_env
    ant.set_state(np.concatenate([position, ant.data.qpos[2:]]), ant.data.qvel.copy())


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_give_data_environment_and_time_limit() -> None:
    assert {spec.name for spec in d4rl.ENVIRONMENTS} == set(IDS) < set(ENVIRONMENTS)
    for name, (dataset_id, env_id, steps) in IDS.items():
        spec = resolve(name)
        assert [source.dataset_ids for source in spec.sources] == [(dataset_id,)]
        assert (spec.env_id, gym.spec(spec.env_id).max_episode_steps) == (env_id, steps)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("antmaze-large-divers", "antmaze-large-diverse"),
        ("antmaze-umaze-v2", "antmaze-umaze"),
        ("pen-humna", "pen-human"),
        ("relocate-clone", "relocate-cloned"),
    ],
)
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UnknownEnvironment, match=f"Nearest: .*{meant}[,.]"):
        resolve(typed)


def test_names_need_no_simulator() -> None:
    listing = (
        "import sys; from train.data import d4rl; print(len(d4rl.ENVIRONMENTS), 'gymnasium_robotics' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", listing], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [str(len(IDS)), "False"]


@pytest.mark.parametrize("name", ["antmaze-umaze", "door-human"])
def test_making_an_environment_is_quiet(robotics, name: str) -> None:
    """gymnasium-robotics prints a notice when it is first imported."""
    making = (
        f"import gymnasium; from train.environments import resolve; gymnasium.make(resolve({name!r}).env_id).reset()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", making], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert (ran.stdout, ran.stderr) == ("", "")


@pytest.mark.parametrize("name", ["antmaze-umaze", "door-human"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_missing_simulator_is_reported_before_any_download(monkeypatch, name: str, cached: bool) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked for data")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda what: None if "robotics" in what else find(what))
    monkeypatch.setattr(minari, "download_dataset", fail)
    monkeypatch.setattr(hosted.minari_cache, "read", fail)
    monkeypatch.setattr(hosted, "_hub_problem", fail)
    monkeypatch.setattr(hosted.minari_cache, "is_cached", lambda dataset_id: cached)
    with pytest.raises(NotInstalled, match=rf"{name} needs gymnasium_robotics: pip install -e '\.\[d4rl\]'"):
        load_dataset(resolve(name))


def test_without_a_network_the_error_says_what_to_fetch(robotics) -> None:
    with pytest.raises(DatasetUnavailable, match=r"hub cannot be reached[\s\S]*minari download D4RL/pen/cloned-v2`"):
        load_dataset(resolve("pen-cloned"))


# --- AntMaze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maze", MAPS)
def test_mazes(robotics, tmp_path, maze: str) -> None:
    """The walls are those of the recordings; start and goal are D4RL's cells; nothing is left in the temporary folder,
    and the goal stays while starts vary."""
    env = gym.make(resolve(next(name for name in IDS if name.startswith(f"antmaze-{maze}"))).env_id)
    assert list(tmp_path.iterdir()) == []
    bare = env.unwrapped
    walls = [[cell == 1 for cell in row] for row in bare.maze.maze_map]
    assert walls == [[cell == 1 for cell in row] for row in getattr(robotics.maps, MAPS[maze])]
    goal, start = (bare.maze.cell_rowcol_to_xy(np.array(cell)) for cell in (GOALS[maze], STARTS[maze]))
    np.testing.assert_array_equal(d4rl.MAZES[maze].goal, goal)
    near = goal + np.array([[0, 0], [0.49, 0], [0, -0.51], [-0.34, 0.34], [0.37, 0.37]])
    assert d4rl.MAZES[maze].reached(near).tolist() == [True, True, False, True, False]
    positions = []
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        assert info["success"] is False
        np.testing.assert_array_equal(bare.goal, goal)
        np.testing.assert_array_equal(bare.model.site("target").pos[:2], goal)
        positions.append(observation[:2])
    assert np.abs(positions - start).max() <= 1
    assert len(np.unique(positions, axis=0)) == 4
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
    assert env.action_space == gym.spaces.Box(-1, 1, (8,), np.float32)
    env.close()


@pytest.mark.parametrize("name", ["antmaze-umaze", "antmaze-medium-play", "antmaze-large-diverse"])
def test_antmaze_recordings(robotics, name: str) -> None:
    """An ant follows a goal elsewhere, and is moved to the evaluation's goal for steps 3 and 4."""
    spec, maze = resolve(name), name.split("-")[1]
    goal, away = d4rl.MAZES[maze].goal, {3: [0.3, 0.2], 4: [0, -0.4], 5: [0.4, 0.5]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is not the newest
        env = gym.make(
            f"AntMaze_{MAPS[maze].replace('_MAZE', '').title().replace('U', 'UMaze')}-v4",
            maze_map=[[{0: 0, 1: 1}[cell] for cell in row] for row in getattr(robotics.maps, MAPS[maze])],
            max_episode_steps=7,
        )
    states = record(
        spec.sources[0].dataset_ids[0], env, lambda env, t: place(env, goal + away[t]) if t in away else None
    )
    (stored,) = minari.load_dataset(spec.sources[0].dataset_ids[0])
    assert not np.any(stored.rewards), "the goal that it follows is the evaluation's"
    dataset = load_dataset(spec)
    assert dataset.rewards.tolist() == [-1, -1, -1, 0, 0, -1, -1]
    assert dataset.masks.tolist() == [1, 1, 1, 0, 0, 1, 1]
    assert (dataset.outcomes.returns.tolist(), dataset.outcomes.successes.tolist()) == ([-5], [True])
    assert "1 episodes, 7 transitions, mean return -5, score 100.0" in dataset.source[0]
    assert dataset.source[1:] == (d4rl.ANTMAZE_NOTE,)
    assert "not D4RL's recordings" in d4rl.ANTMAZE_NOTE
    # the evaluation shows, rewards and ends the same in the same states
    evaluation = gym.make(spec.env_id)
    evaluation.reset(seed=0)
    ant = evaluation.unwrapped.ant_env
    for t, state in enumerate(states):
        ant.set_state(*np.split(state, [ant.model.nq]))
        observation, reward, terminated, truncated, info = evaluation.step(stored.actions[t])
        np.testing.assert_array_equal(dataset.next_observations[t], observation.astype(np.float32))
        np.testing.assert_array_equal(observation, np.concatenate([ant.data.qpos, ant.data.qvel]))
        assert (reward, terminated, truncated) == (dataset.rewards[t], dataset.masks[t] == 0, False)
        assert info["success"] is (t in (3, 4))
    evaluation.close()


def test_evaluation_ends_at_the_goal_or_the_time_limit(robotics) -> None:
    spec, calls = resolve("antmaze-umaze"), []
    envs = kept_vector_env(spec.env_id, 2)

    def policy(observations: np.ndarray) -> np.ndarray:
        assert observations.shape == (2, 29)
        calls.append(observations)
        if len(calls) == 3:
            place(envs.envs[0], d4rl.MAZES["umaze"].goal)
        return np.zeros((2, 8), np.float32)

    outcomes = run_episodes(spec.env_id, policy, episodes=2, seed=0)
    assert len(calls) == 700
    assert outcomes.returns.tolist() == [-2, -700]
    assert spec.scoring(outcomes).tolist() == [100, 0]


# --- Adroit -----------------------------------------------------------------------------------------------------------


def drop(env: Any, t: int) -> None:
    """Let the pen fall before step 4, and put it back before step 6."""
    if t in (4, 6):
        position = env.data.qpos.copy()
        position[-6] += 0.2 if t == 4 else -0.2  # downwards
        env.set_state(position, 0 * env.data.qvel)


@pytest.mark.parametrize("task", WIDTHS)
def test_adroit_recordings(robotics, task: str) -> None:
    spec, (obs_dim, action_dim) = resolve(f"{task}-human"), WIDTHS[task]
    env = gym.make(f"AdroitHand{task.capitalize()}-v1", max_episode_steps=8)
    states = record(spec.sources[0].dataset_ids[0], env, drop if task == "pen" else lambda env, t: None)
    (stored,) = minari.load_dataset(spec.sources[0].dataset_ids[0])
    dataset = load_dataset(spec)
    assert (dataset.observations.shape, dataset.actions.shape) == ((8, obs_dim), (8, action_dim))
    np.testing.assert_array_equal(dataset.observations, stored.observations[:-1].astype(np.float32))
    np.testing.assert_array_equal(dataset.next_observations, stored.observations[1:].astype(np.float32))
    np.testing.assert_array_equal(dataset.rewards, stored.rewards.astype(np.float32))
    assert np.flatnonzero(dataset.masks == 0).tolist() == ([4, 5] if task == "pen" else [])
    assert dataset.outcomes.returns == pytest.approx(stored.rewards.sum())
    assert dataset.source[1:] == (spec.sources[0].note,)
    assert f"longer than the evaluation's {IDS[spec.name][2]};" in f"{spec.sources[0].note};"
    assert ("grows with the hand's distance" in spec.sources[0].note) == (task != "pen")
    evaluation = gym.make(spec.env_id)
    evaluation.reset(seed=5)  # the same target, or the same door, board or ball
    bare = evaluation.unwrapped
    for t, state in enumerate(states):
        bare.set_state(*np.split(state, [bare.model.nq]))
        observation, reward, terminated, truncated, info = evaluation.step(stored.actions[t])
        np.testing.assert_allclose(dataset.next_observations[t], observation, rtol=1e-4, atol=1e-4)
        assert reward == pytest.approx(float(dataset.rewards[t]), abs=1e-3)
        assert (terminated, truncated) == (dataset.masks[t] == 0, False)
        assert not info["success"]
    evaluation.close()


def test_the_wrong_sign_is_as_the_note_says(robotics) -> None:
    """The door's reward, less D4RL's formula (door_v0.py), is twice the term with the wrong sign."""
    env, rng, off = gym.make(resolve("door-expert").env_id), np.random.default_rng(1), 0.0
    env.reset(seed=0)
    for _ in range(200):
        observation, reward, *_ = env.step(rng.uniform(-1, 1, 28).astype(np.float32))
        hinge, distance = observation[28], np.linalg.norm(observation[35:38])
        assert hinge < 0.2, "opened by chance, which earns more"
        speed = np.sum(env.unwrapped.data.qvel**2)
        off += reward - (-0.1 * distance - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * speed)
        assert reward + 0.1 * (hinge - 1.57) ** 2 + 1e-5 * speed == pytest.approx(0.1 * distance)
    _, random, expert = d4rl.ADROIT["door"]
    assert 0 < 100 * off / (expert - random) < 1, "the note says less than a point"
    env.close()


@pytest.mark.parametrize("task", WIDTHS)
def test_adroit_time_limit(robotics, task: str) -> None:
    """With a hand at rest, which keeps the pen."""
    env = gym.make(resolve(f"{task}-expert").env_id)
    env.reset(seed=0)
    ends = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(d4rl.ADROIT[task][0])]
    assert ends == [(False, False)] * (len(ends) - 1) + [(False, True)]
    env.close()


@pytest.mark.parametrize(
    ("task", "random", "expert"),
    [
        ("pen", 96.262799, 3076.8331017826877),
        ("door", -56.512833, 2880.5693087298737),
        ("hammer", -274.856578, 12794.134825156867),
        ("relocate", -6.425911, 4233.877797728884),
    ],
)
@pytest.mark.parametrize("quality", ["human", "cloned", "expert"])
def test_normalized_score_is_d4rls(task: str, quality: str, random: float, expert: float) -> None:
    returns = np.array([random, (random + expert) / 2, expert])
    scores = resolve(f"{task}-{quality}").scoring(Outcomes(returns, np.zeros(3, bool)))
    np.testing.assert_allclose(scores, [0, 50, 100], atol=1e-9)
