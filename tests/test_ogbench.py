"""OGBench's single tasks: names, rewards of recorded states, files that are refused, and reproducible episodes."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from train import environments, play, run
from train.behaviour import scripted
from train.data import collected, npz, ogbench
from train.data.generated import EPISODES
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable, EnvSpec, NotInstalled
from train.environments import ENVIRONMENTS, resolve
from train.evaluate import run_episodes
from train.simulator import kept_vector_env, make_vector_env

pytest.importorskip("ogbench", reason="OGBench is an extra of this project")

MAZE = resolve("pointmaze-medium-navigate-singletask-task1-v0")
CUBE = resolve("cube-single-play-singletask-task2-v0")
STATES = 40


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No files, no network, and short generated episodes."""
    monkeypatch.setattr(ogbench, "FOLDER", tmp_path / "downloads")
    monkeypatch.setenv("FDKERNELS_DATA", str(tmp_path / "collected"))
    monkeypatch.setattr(ogbench.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(EPISODES, "default", 10)
    for name, recipe in scripted.RECIPES.items():
        monkeypatch.setitem(scripted.RECIPES, name, dataclasses.replace(recipe, rows=STATES))
    return tmp_path


# -- names -------------------------------------------------------------------------------------------------------------


def test_all_tasks_that_have_data_are_listed() -> None:
    registered = {name for name in gym.registry if "-singletask" in name and not name.startswith("fdk")}
    listed = {spec.env_id.removeprefix("fdkernels/") for spec in ogbench.ENVIRONMENTS}
    assert listed <= registered
    assert {name for name in registered - listed if "humanoidmaze-teleport" not in name} == set()
    assert len([name for name in listed if name.startswith("visual-")]) == 6 * (4 + 3 + 4 + 1 + 4)


def test_a_name_is_an_environment_and_its_data() -> None:
    spec = resolve("puzzle-4x4-noisy-singletask-v0")
    assert spec.env_id == "fdkernels/puzzle-4x4-singletask-v0"
    assert [source.dataset for source in spec.sources] == ["puzzle-4x4-noisy-v0"] * 2
    scene = resolve("scene-play-singletask-task3-v0")
    assert (scene.env_id, scene.sources[0].dataset) == ("fdkernels/scene-singletask-task3-v0", "scene-play-v0")
    with pytest.raises(environments.UnknownEnvironment, match=r"Nearest: .*cube-single-play-singletask-task"):
        resolve("cube-single-play-singletask-task6-v0")


def test_what_can_be_collected_is_what_the_scripts_play() -> None:
    datasets = {spec.sources[1].name for spec in ogbench.ENVIRONMENTS}
    assert set(scripted.RECIPES) <= datasets


# -- rewards -----------------------------------------------------------------------------------------------------------


def seek(spec: EnvSpec) -> Callable[[np.ndarray], np.ndarray]:
    """A policy for point mazes that knows the map."""
    maze = gym.make(spec.env_id).unwrapped
    maze.reset()

    def act(observations: np.ndarray) -> np.ndarray:
        directions = [maze.get_oracle_subgoal(xy, maze.cur_goal_xy)[0] - xy for xy in observations]
        return np.array([d / (np.linalg.norm(d) + 1e-6) for d in directions], np.float32)

    return act


def test_recorded_states_earn_what_the_environment_pays() -> None:
    """In the order of OGBench's single tasks: the reward belongs to the state before the action."""
    env, act = gym.make(MAZE.env_id, terminate_at_goal=False), seek(MAZE)
    observation, _ = env.reset(seed=0)
    rows: dict[str, list[Any]] = {name: [] for name in (*ogbench.COLUMNS[:4], "paid")}
    for step in range(200):
        action = act(observation[None])[0]
        following, reward, _, _, info = env.step(action)
        for name, value in zip(rows, (observation, action, step in (79, 199), info["prev_qpos"], reward)):
            rows[name].append(value)
        observation = following
    columns = {name: np.array(values, np.float32) for name, values in rows.items()}
    paid = columns.pop("paid")
    assert 0 < (paid == 0).sum() < 150, "the point must arrive"
    first, second = ogbench.of_task(columns, MAZE.env_id.removeprefix("fdkernels/"))
    np.testing.assert_array_equal(first.rewards, paid[:79])
    np.testing.assert_array_equal(second.rewards, paid[80:199])
    np.testing.assert_array_equal(second.masks, paid[80:199] < 0)
    np.testing.assert_array_equal(second.observations, columns["observations"][80:200])
    np.testing.assert_array_equal(second.actions, columns["actions"][80:199])
    assert (first.success, second.success) == (bool((paid[:80] == 0).any()), True)


def test_generated_data_teach_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(MAZE)
    assert dataset.dataset_ids == ("fdkernels/pointmaze-medium-navigate-10ep-v0",)
    assert "HF_HUB_OFFLINE forbids downloads" in dataset.source[0]
    assert "scripted controllers, generated now" in dataset.source[1]
    assert len(dataset) == 10 * (STATES - 1)
    assert set(dataset.rewards.unique().tolist()) <= {-1.0, 0.0}
    assert torch.equal(dataset.masks == 0, dataset.rewards == 0)
    inner = torch.arange(len(dataset)) % (STATES - 1) != STATES - 2
    assert torch.equal(dataset.next_observations[:-1][inner[:-1]], dataset.observations[1:][inner[:-1]])
    unpacked: list[str] = []
    with monkeypatch.context() as counted:
        counted.setattr(npz, "opened", lambda path, opened=npz.opened: (unpacked.append(path.name), opened(path))[1])
        again = load_dataset(MAZE)
    assert "not looked for, there are episodes of OGBench's scripted controllers" in again.source[0]
    assert "local files" in again.source[1]
    assert unpacked == [part.name for part in collected.parts("pointmaze-medium-navigate", 10)]
    assert torch.equal(again.rewards, dataset.rewards)
    other = load_dataset(dataclasses.replace(MAZE, sources=resolve(MAZE.name.replace("task1", "task2")).sources))
    assert torch.equal(other.observations, dataset.observations), "another task has the same states"


def test_the_number_of_generated_episodes_can_be_asked_for() -> None:
    assert len(load_dataset(MAZE, size=3).outcomes.returns) == 3


@pytest.mark.long("two scenes are compiled, and the arm is simulated")
@pytest.mark.parametrize("name", ["cube-single-play-singletask-task2-v0", "puzzle-3x3-play-singletask-v0"])
def test_generated_data_of_the_arm(name: str) -> None:
    dataset = load_dataset(resolve(name), size=1)
    assert len(dataset) == STATES - 1
    assert dataset.observations.shape[1] == kept_vector_env(resolve(name).env_id, 1).single_observation_space.shape[0]
    worst = -1 if "cube" in name else -9
    assert ((dataset.rewards >= worst) & (dataset.rewards <= 0)).all()


def test_no_controller_for_ants(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetUnavailable) as error:
        load_dataset(resolve("antmaze-large-navigate-singletask-v0"))
    assert "there is no" in str(error.value)
    assert "OGBench has no scripted controller for it" in str(error.value)
    assert "copy antmaze-large-navigate-v0.npz into" in str(error.value)


# -- files -------------------------------------------------------------------------------------------------------------


def columns_of_a_file(episodes: int = 3) -> dict[str, np.ndarray]:
    collected.collect("pointmaze-medium-navigate", episodes, workers=1)
    columns = collected.read("pointmaze-medium-navigate", episodes)
    return {name: values for name, values in columns.items() if name != "qvel"}


def put(columns: dict[str, Any], spec: EnvSpec = MAZE) -> Path:
    path: Path = spec.sources[0].path
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **columns)
    return path


def test_ogbenchs_own_file_comes_first() -> None:
    columns = columns_of_a_file()
    put(columns)
    dataset = load_dataset(MAZE)
    assert dataset.dataset_ids == ("pointmaze-medium-navigate-v0",)
    assert dataset.source[0].startswith("pointmaze-medium-navigate-v0 (OGBench, local file): 3 episodes")
    generated = load_dataset(dataclasses.replace(MAZE, sources=MAZE.sources[1:]), size=3)
    assert torch.equal(dataset.observations, generated.observations)


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    def apply(columns: dict[str, Any]) -> None:
        columns[name] = edit(columns[name].copy())

    return apply


def spoil(at: int, value: float, column: np.ndarray) -> np.ndarray:
    column[at] = value
    return column


def spoilt(name: str, at: int, value: float) -> Callable[[dict[str, Any]], None]:
    return change(name, functools.partial(spoil, at, value))


SECOND, THIRD = STATES + 2, 2 * STATES + 5
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no end": (spoilt("terminals", -1, False), "episode 2 has no end"),
    "no positions": (lambda columns: columns.pop("qpos"), "lacks qpos"),
    "short column": (change("actions", lambda column: column[:-1]), "different lengths"),
    "NaN position": (spoilt("qpos", SECOND, np.nan), "episode 1 has NaN or infinity in its qpos"),
    "NaN observation": (spoilt("observations", SECOND, np.nan), r"episode 1 has nan.* at \(2, 0\)"),
    "wild action": (spoilt("actions", THIRD, 1.5), r"episode 2 has the action 1.5 .* at \(5, 0\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused(fault: str) -> None:
    spoil, message = FAULTS[fault]
    columns = columns_of_a_file()
    spoil(columns)
    put(columns)
    with pytest.raises(DatasetUnavailable, match=f"(?s)pointmaze-medium-navigate-v0.*{message}"):
        load_dataset(MAZE)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_arrays_are_not_unpickled(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "exploded")], object)
    pickle.loads(pickle.dumps(bomb))
    (tmp_path / "exploded").unlink()  # a test that can fail: the bomb works
    path = put({**columns_of_a_file(), "observations": bomb})
    with pytest.raises(DatasetUnavailable, match=f"(?s){path}.*cannot be read.*allow_pickle"):
        load_dataset(MAZE)
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file_is_refused_by_name() -> None:
    path = put(columns_of_a_file())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetUnavailable, match=f"(?s){path} cannot be read.*delete the file"):
        load_dataset(MAZE)


def test_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from ogbench import utils

    monkeypatch.setattr(ogbench.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ogbench, "problem_with", lambda server, ask: f"{server} is down")
    assert "is down" in load_dataset(MAZE).source[0]
    monkeypatch.setattr(ogbench, "problem_with", lambda server, ask: None)
    columns, asked = columns_of_a_file(), []

    def download(names: list[str], folder: str) -> None:
        asked.append((names, folder))
        put(columns)

    monkeypatch.setattr(utils, "download_datasets", download)
    monkeypatch.setattr(collected, "is_collected", lambda *a: False)
    assert "downloaded now" in load_dataset(MAZE).source[0]
    assert asked == [(["pointmaze-medium-navigate-v0"], str(ogbench.FOLDER))]


def test_a_download_counts_if_only_the_validation_file_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ogbench import utils

    monkeypatch.setattr(ogbench.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ogbench, "problem_with", lambda server, ask: None)
    monkeypatch.setattr(collected, "is_collected", lambda *a: False)
    columns = columns_of_a_file()

    def download(names: list[str], folder: str) -> None:
        put(columns)
        raise OSError("no such file on the server")

    monkeypatch.setattr(utils, "download_datasets", download)
    assert "downloaded now" in load_dataset(MAZE).source[0]
    MAZE.sources[0].path.unlink()
    monkeypatch.setattr(utils, "download_datasets", lambda *a: 1 / 0)
    assert "failed (ZeroDivisionError" in load_dataset(MAZE).source[0]


def test_a_disk_that_is_full_is_no_reason_to_delete_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    put(columns_of_a_file())

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ogbench.npz, "read", full)
    with pytest.raises(DatasetUnavailable, match="No space left on device") as error:
        load_dataset(MAZE)
    assert "delete" not in str(error.value)


# -- the environments --------------------------------------------------------------------------------------------------


def test_success_is_what_scores() -> None:
    """A policy that knows the way succeeds in every episode, and the episode ends there."""
    outcomes = run_episodes(MAZE.env_id, seek(MAZE), episodes=3, seed=0)
    assert MAZE.scoring(outcomes).tolist() == [100, 100, 100]
    assert (outcomes.returns > -250).all(), "an episode did not end at its goal"
    lost = run_episodes(MAZE.env_id, lambda obs: np.ones((len(obs), 2), np.float32), episodes=2, seed=0)
    assert MAZE.scoring(lost).tolist() == [0, 0]
    assert lost.returns.tolist() == [-1000, -1000]


def trace(env: gym.Env, seed: int, steps: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    observations = [env.reset(seed=seed)[0]]
    d = env.action_space.shape[-1]
    return observations + [env.step(rng.uniform(-1, 1, (1, d)).astype(np.float32))[0] for _ in range(steps)]


@pytest.mark.parametrize(
    "name",
    [
        MAZE.name,
        "antmaze-medium-navigate-singletask-v0",
        pytest.param(CUBE.name, marks=pytest.mark.long("two scenes are compiled")),
        pytest.param("scene-play-singletask-v0", marks=pytest.mark.long("two scenes are compiled")),
        pytest.param("puzzle-3x3-play-singletask-v0", marks=pytest.mark.long("two scenes are compiled")),
    ],
)
def test_a_seed_gives_the_same_episode_in_fresh_and_used_environments(name: str) -> None:
    used, fresh = (make_vector_env(resolve(name).env_id, 1) for _ in range(2))
    trace(used, seed=1)
    np.random.seed(5)  # noqa: NPY002
    for a, b in zip(trace(used, seed=2), trace(fresh, seed=2)):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(trace(used, seed=3)[0], trace(used, seed=2)[0])
    used.close()
    fresh.close()


def test_a_teleport_does_not_depend_on_the_episodes_beside() -> None:
    teleports = resolve("pointmaze-teleport-navigate-singletask-task1-v0").env_id
    alone, together = make_vector_env(teleports, 1), make_vector_env(teleports, 3)
    paths = []
    for envs in (alone, together):
        envs.reset(seed=0)
        for i, env in enumerate(envs.envs):
            env.unwrapped.set_xy(env.unwrapped._teleport_info["teleport_in_xys"][i % 2])
        still = np.zeros((envs.num_envs, 2), np.float32)
        path = []
        for _ in range(12):  # those that arrive at a way in are sent on
            envs.step(still)
            path.append(envs.envs[0].unwrapped.get_xy())
            envs.envs[0].unwrapped.set_xy(envs.envs[0].unwrapped._teleport_info["teleport_in_xys"][0])
        paths.append(path)
    np.testing.assert_array_equal(*paths)
    assert len({tuple(np.round(at)) for at in paths[0]}) > 1, "nothing was drawn"


@pytest.mark.long("a scene is compiled")
def test_films_of_the_arm_have_a_speed() -> None:
    assert gym.make(CUBE.env_id).metadata["render_fps"] == 20


def test_environments_are_quiet(recwarn: pytest.WarningsRecorder) -> None:
    make_vector_env(MAZE.env_id, 1).reset(seed=0)
    assert [str(w.message) for w in recwarn if w.category is not ResourceWarning] == []


# -- without the package -----------------------------------------------------------------------------------------------


def test_without_the_package_the_names_are_there_and_an_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"needs ogbench: pip install -e '\.\[ogbench\]'"):
        load_dataset(MAZE)
    assert run.main(["--env", MAZE.name, "--preset", "quick", "--out", "unused"]) == 2
    assert "pip install" in capsys.readouterr().err
    assert MAZE.name in ENVIRONMENTS
    assert NotInstalled in play.REFUSALS
