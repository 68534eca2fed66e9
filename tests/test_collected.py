"""Episodes of OGBench's scripted controllers: their bits, what they do, and their parts on disk."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tests.read_errors import PASSING, SAID, fail, files_in
from tests.waiting import PATIENCE, descendants, wait_for
from train import collect as command
from train.behaviour import scripted
from train.behaviour.scripted import CannotPlay, Episode
from train.data import collected, npz, room
from train.data.collected import PART_EPISODES

pytest.importorskip("ogbench", reason="OGBench is an extra of this project")
from ogbench.relabel_utils import relabel_dataset
from ogbench.utils import load_dataset

ROOT = Path(__file__).parents[1]
MAZE = "pointmaze-medium-stitch"
SHORT = 20  # rows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FDKERNELS_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def short(monkeypatch) -> None:
    """Short episodes for everything."""
    for name, recipe in scripted.RECIPES.items():
        monkeypatch.setitem(scripted.RECIPES, name, dataclasses.replace(recipe, rows=SHORT))


@pytest.fixture
def played(short, monkeypatch) -> list[int]:
    """Quick stand-ins for episodes, whose observations tell their seed; the list has the seeds that were played."""
    seeds: list[int] = []

    def play(name: str, seed: int) -> Episode:
        seeds.append(seed)
        ones = np.ones((SHORT, 2), np.float32)
        last = np.arange(SHORT) == SHORT - 1
        return {"observations": ones * (seed % 1000), "actions": ones, "terminals": last, "qpos": ones, "qvel": ones}

    monkeypatch.setattr(scripted, "play", play)
    return seeds


def assert_equal(a: Episode, b: Episode) -> None:
    assert list(a) == list(b)
    for column in a:
        assert a[column].dtype == b[column].dtype, column
        np.testing.assert_array_equal(a[column], b[column], column)


def seeds_of(name: str, *indices: int) -> list[int]:
    return [collected.seed_of(name, index) for index in indices]


# --- episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"), [("cube-double-play", 60), ("scene-noisy", 160), ("pointmaze-teleport-navigate", 60)]
)
def test_the_same_seed_gives_the_same_bits_whatever_came_before(name: str, rows: int) -> None:
    scripted._make.cache_clear()  # as in a new process
    first = scripted.play(name, 3, rows=rows)
    other = scripted.play(name, 4, rows=rows)
    np.random.rand()  # noqa: NPY002
    assert_equal(scripted.play(name, 3, rows=rows), first)
    assert not np.array_equal(other["observations"], first["observations"])
    assert not np.array_equal(other["actions"], first["actions"])


def test_the_global_generator_is_left_alone(monkeypatch) -> None:
    def state() -> str:
        return str(np.random.get_state())  # noqa: NPY002

    before = state()
    scripted.play(MAZE, 0, rows=5)
    assert state() == before

    def interrupted(self, env, rng, rows):
        np.random.rand()  # noqa: NPY002
        raise KeyboardInterrupt

    monkeypatch.setattr(scripted.Maze, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scripted.play(MAZE, 0)
    assert state() == before


@pytest.mark.parametrize(("name", "rows"), [(MAZE, 201), ("pointmaze-large-navigate", 1001)])
def test_episodes_of_mazes(name: str, rows: int) -> None:
    e = scripted.play(name, 0)
    assert {column: (v.shape, v.dtype.name) for column, v in e.items()} == {
        "observations": ((rows, 2), "float32"),
        "actions": ((rows, 2), "float32"),
        "terminals": ((rows,), "bool"),
        "qpos": ((rows, 2), "float32"),
        "qvel": ((rows, 2), "float32"),
    }
    assert np.flatnonzero(e["terminals"]).tolist() == [rows - 1]
    np.testing.assert_array_equal(e["observations"], e["qpos"], "positions are not those before the step")
    assert np.abs(e["actions"]).max() == 1, "nothing was clipped"
    unhindered = np.abs(np.diff(e["qpos"], axis=0) - 0.2 * e["actions"][:-1]).max(1) < 1e-5
    assert unhindered.mean() > 0.5, "the actions are not those that led from one row to the next"


def test_the_point_visits_one_goal_after_another_or_one_nearby() -> None:
    def cells(name: str, seed: int) -> set[tuple[int, int]]:
        return {(int(i), int(j)) for j, i in np.round((scripted.play(name, seed)["qpos"] + 4) / 4)}

    assert len(cells("pointmaze-medium-navigate", 0)) >= 10
    visited = [cells(MAZE, seed) for seed in range(5)]
    assert all(len(v) <= 6 for v in visited)
    assert max(len(v) for v in visited) == 5, "no goal at a distance of four cells was reached"
    assert len(set.union(*visited)) > 8, "all start at the same place"


def test_cells_of_a_maze() -> None:
    walls = ["#######", "#   # #", "# ### #", "#     #", "### ###", "### ###", "#######"]
    free, vertices = scripted._cells(np.array([[int(cell == "#") for cell in row] for row in walls]))
    assert free == [(i, j) for i, row in enumerate(walls) for j, cell in enumerate(row) if cell == " "]
    ends, corners, junctions = [(1, 3), (1, 5), (5, 3)], [(1, 1), (3, 1), (3, 5)], [(3, 3)]
    assert vertices == sorted(ends + corners + junctions)
    _, (middle,) = scripted._cells(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]))
    assert middle == (1, 1), "a cell that is walled in is no corridor"
    _, crossing = scripted._cells(np.pad([[1, 0, 1], [0, 0, 0], [1, 0, 1]], 1, constant_values=1))
    assert (2, 2) in crossing


def test_the_arm_moves_the_cube_to_several_places() -> None:
    e = scripted.play("cube-single-play", 1, rows=350)
    assert {column: (v.shape, v.dtype.name) for column, v in e.items()} == {
        "observations": ((350, 28), "float32"),
        "actions": ((350, 5), "float32"),
        "terminals": ((350,), "bool"),
        "qpos": ((350, 21), "float32"),
        "qvel": ((350, 20), "float32"),
    }
    cube = e["qpos"][:, 14:17]
    np.testing.assert_allclose(e["observations"][:, 19:22], 10 * (cube - [0.425, 0, 0]), atol=1e-5)
    moved = np.linalg.norm(np.diff(cube, axis=0), axis=1) > 1e-3
    rests = [np.median(cube[run], axis=0) for run in runs(~moved) if len(run) >= 10]
    places = [a for a, b in itertools.pairwise(rests) if np.linalg.norm(a[:2] - b[:2]) > 0.05]
    assert len(places) >= 2, f"it only lay at {rests}"
    assert cube[:, 2].max() > 0.1, "never lifted"


def runs(flags: np.ndarray) -> list[np.ndarray]:
    """Indices of every run of true flags."""
    indices = np.flatnonzero(flags)
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)


def test_the_arm_presses_buttons() -> None:
    buttons = scripted.play("puzzle-3x3-play", 0, rows=120)["button_states"]
    assert (buttons.shape, buttons.dtype) == ((120, 9), np.int64)
    assert set(np.unique(buttons)) == {0, 1}
    changed = (np.diff(buttons, axis=0) != 0).sum(1)
    assert (changed > 0).sum() >= 3, "fewer than three presses"
    assert set(changed) <= {0, 3, 4, 5}, "a press changes the button and its neighbours"


@pytest.mark.long("every task and style, a third of an episode each; whole ones of scenes")
@pytest.mark.parametrize("name", [n for n in scripted.RECIPES if not n.startswith("pointmaze")])
def test_every_controller_achieves_something(name: str) -> None:
    rows = 1001 if name.startswith("scene") else 350
    e = scripted.play(name, 0, rows=rows)
    if name.startswith(("cube", "scene")):
        count = (e["qpos"].shape[1] - 14) // 7
        cubes = e["qpos"][:, 14 : 14 + 7 * count].reshape(rows, count, 7)
        assert np.linalg.norm(np.ptp(cubes[:, :, :2], axis=0), axis=-1).max() > 0.05, "no cube was moved"
    if "button_states" in e:
        assert (np.diff(e["button_states"], axis=0) != 0).any(1).sum() >= 2, "hardly a button was pressed"
    if name.startswith("scene"):
        assert (np.ptp(e["qpos"][:, 23:25], axis=0) > 0.1).all(), "drawer or window was not moved"
    if name.endswith("-noisy"):
        assert (np.abs(e["actions"][:, :3]) == 1).any(), "noise and random actions never reach the bounds"


def test_noisy_data_have_noise_and_random_actions(monkeypatch) -> None:
    def altered() -> float:
        """Share of rows whose gripper is not told to open or to close: the controller only does either."""
        return float((np.abs(scripted.play("puzzle-3x3-noisy", 2, rows=120)["actions"][:, 4]) < 1).mean())

    assert altered() > 0.35, "half of the noise is clipped away"
    monkeypatch.setattr(scripted, "MOST_NOISE", 0)
    assert 0.1 < altered() < 0.3, "a fifth of the actions is random"
    recipe = scripted.RECIPES["puzzle-3x3-noisy"]
    monkeypatch.setitem(scripted.RECIPES, "puzzle-3x3-noisy", dataclasses.replace(recipe, random_actions=0.0))
    assert altered() == 0


def test_a_scene_whose_cube_escapes_is_played_again(monkeypatch) -> None:
    def scene(y: float, z: float) -> Episode:
        qpos = np.zeros((3, 25))
        qpos[1, 15:17] = y, z
        return {"qpos": qpos}

    recipe = scripted.RECIPES["scene-play"]
    assert [recipe.is_healthy(scene(*yz)) for yz in [(0, 0.02), (0.28, 0.02), (-0.35, 0.07)]] == [True] * 3
    assert [recipe.is_healthy(scene(*yz)) for yz in [(0.29, 0.02), (-0.3, 0.05), (-0.3, 0.09)]] == [False] * 3
    assert scripted.RECIPES["cube-single-play"].is_healthy(scene(0.29, 0.02)), "only scenes are checked"

    healthy = scripted.play(MAZE, 7, rows=10)
    verdicts = iter([False, False, True, False, False, True])
    monkeypatch.setattr(scripted.Maze, "is_healthy", lambda self, episode: next(verdicts))
    third = scripted.play(MAZE, 7, rows=10)
    assert not np.array_equal(third["qpos"], healthy["qpos"])
    assert_equal(scripted.play(MAZE, 7, rows=10), third)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("cube-single-play", "cube-single-singletask-task1-v0"),
        ("puzzle-3x3-noisy", "puzzle-3x3-singletask-task4-v0"),
        ("pointmaze-medium-navigate", "pointmaze-medium-singletask-task1-v0"),
    ],
)
def test_ogbench_reads_and_rewards_a_part(short, name: str, task: str) -> None:
    (part,) = collected.collect(name, 1, workers=1)
    dataset = load_dataset(str(part), add_info=True)
    stored = collected.read(name, PART_EPISODES)
    transitions = PART_EPISODES * (SHORT - 1)
    assert len(dataset["observations"]) == len(dataset["next_observations"]) == transitions
    assert dataset["terminals"].sum() == PART_EPISODES
    assert {"qpos", "qvel"} <= set(dataset)
    assert ("button_states" in dataset) == name.startswith("puzzle")
    np.testing.assert_array_equal(dataset["next_observations"][SHORT - 2], stored["observations"][SHORT - 1])
    env = gym.make(task, disable_env_checker=True)
    relabel_dataset(task, env, dataset)
    if name.startswith("puzzle"):
        goal = env.unwrapped._target_button_states
        expected = (dataset["button_states"] == goal).sum(1) - 9.0
        assert len(set(expected)) > 3, "the buttons are hardly in different states"
    else:
        first, goal, tolerance = (14, env.unwrapped._data.mocap_pos[0], 0.04) if "cube" in name else (0, None, 1.0)
        goal = env.unwrapped.cur_goal_xy if goal is None else goal
        distance = np.linalg.norm(dataset["qpos"][:, first : first + len(goal)] - goal, axis=1)
        expected = (distance <= tolerance) - 1.0
    np.testing.assert_array_equal(dataset["rewards"], expected)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cube-singel-play",
            r"no scripted controllers for 'cube-singel-play'\. Nearest: cube-single-play.*scene-{play",
        ),
        ("antmaze-large-navigate", "needs a trained policy"),
        ("visual-cube-single-play", "only states are generated"),
        ("cube-single-play-v0", "Nearest: cube-single-play"),
        ("../cube-single-play", "no scripted controllers"),
        ("cube-single-play/../..", "no scripted controllers"),
        ("/etc", "no scripted controllers"),
        ("", "no scripted controllers"),
    ],
)
def test_other_names_are_refused_and_become_no_path(folder, name: str, message: str) -> None:
    assert not collected.can_collect(name)
    calls = [collected.collect, collected.parts, collected.is_collected, collected.read]
    for call in calls:
        with pytest.raises(CannotPlay, match=message):
            call(name, 1)
    with pytest.raises(CannotPlay, match=message):
        scripted.play(name, 0)
    assert not folder.exists()


def test_every_name_has_its_environment_and_is_in_the_short_list() -> None:
    assert all(collected.can_collect(name) for name in scripted.RECIPES)
    assert all(recipe.env_id in gym.registry for recipe in scripted.RECIPES.values())
    listed = []
    for family in scripted.KNOWN.split(", "):  # as a shell expands braces
        names = [""]
        for piece in family.replace("{", "|").replace("}", "|").split("|"):
            names = [name + choice for name in names for choice in piece.split(",")]
        listed += names
    assert listed == list(scripted.RECIPES)


def test_seeds_of_all_episodes_differ() -> None:
    seeds = {collected.seed_of(name, index) for name in scripted.RECIPES for index in range(1000)}
    assert len(seeds) == 1000 * len(scripted.RECIPES)


# --- parts on disk ----------------------------------------------------------------------------------------------------


def test_episodes_are_rounded_up_to_whole_parts_and_read_exactly(folder, played) -> None:
    assert not collected.is_collected(MAZE, 1)
    made = collected.collect(MAZE, 11, workers=1)
    assert [part.relative_to(folder).as_posix() for part in made] == [f"{MAZE}-v0/part-0000{i}.npz" for i in (0, 1)]
    assert played == seeds_of(MAZE, *range(20))
    assert collected.is_collected(MAZE, 20)
    assert not collected.is_collected(MAZE, 21)
    columns = collected.read(MAZE, 11)
    assert len(columns["actions"]) == 11 * SHORT
    assert columns["observations"][::SHORT, 0].tolist() == [seed % 1000 for seed in seeds_of(MAZE, *range(11))]
    assert np.flatnonzero(columns["terminals"]).tolist() == list(range(SHORT - 1, 11 * SHORT, SHORT))


def test_parts_that_exist_are_not_made_again(played, capsys) -> None:
    first = collected.collect(MAZE, 10, workers=1)
    before = first[0].stat().st_mtime_ns
    del played[:]
    assert collected.collect(MAZE, 25, workers=1)[:1] == first
    assert played == seeds_of(MAZE, *range(10, 30))
    assert first[0].stat().st_mtime_ns == before
    collected.collect(MAZE, 30, workers=1)
    assert len(played) == 20
    assert "damaged" not in capsys.readouterr().err


class Unpickled:
    def __reduce__(self) -> tuple:
        return os._exit, (99,)  # would end the tests


def objects(part: Path) -> None:
    np.savez(part, observations=np.array([Unpickled()], object))


def without_positions(part: Path) -> None:
    with np.load(part) as file:
        columns = {column: file[column] for column in file.files if column != "qpos"}
    np.savez(part, **columns)


def of_other_episodes(part: Path) -> None:
    with np.load(part) as file:
        columns = {column: file[column] for column in file.files}
    columns["terminals"][[SHORT - 1, SHORT]] = False, True
    np.savez(part, **columns)


def truncated(part: Path) -> None:
    os.truncate(part, part.stat().st_size // 2)


def emptied(part: Path) -> None:
    part.write_bytes(b"")


def flipped(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[100] ^= 255  # in the compressed observations
    part.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [truncated, emptied, flipped, objects, without_positions, of_other_episodes],
)
def test_a_damaged_part_is_named_and_made_again(played, capsys, damage: Callable[[Path], None]) -> None:
    parts = collected.collect(MAZE, 30, workers=1)
    before = collected.read(MAZE, 30)
    damage(parts[1])
    del played[:]
    with pytest.raises(collected.Unreadable, match=r"part-00001\.npz is damaged"):
        collected.read(MAZE, 30)
    collected.collect(MAZE, 30, workers=1)
    assert f"{parts[1]} is damaged" in capsys.readouterr().err
    assert played == seeds_of(MAZE, *range(10, 20))
    assert_equal(collected.read(MAZE, 30), before)


@pytest.mark.parametrize("fault", SAID)
def test_what_says_nothing_about_a_part_costs_none(folder, played, monkeypatch, capsys, fault: str) -> None:
    first, _ = collected.collect(MAZE, 20, workers=1)
    before = files_in(folder)
    del played[:]
    with monkeypatch.context() as faulty:
        if fault in PASSING:
            faulty.setattr(npz.npy, "read_array", fail(PASSING[fault]))
        else:
            faulty.setattr(room, "available", lambda: 9)
        with pytest.raises(OSError) as error:
            collected.read(MAZE, 20)
        assert error.value.filename == str(first)
        capsys.readouterr()
        assert command.main(["--env", MAZE, "--episodes", "20", "--workers", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert SAID[fault] in line
    assert str(first) in line
    assert not played
    assert files_in(folder) == before
    assert len(collected.read(MAZE, 20)["actions"]) == 20 * SHORT


def test_a_missing_part_is_not_read(played) -> None:
    collected.collect(MAZE, 10, workers=1)
    with pytest.raises(collected.Unreadable, match=r"part-00001\.npz does not exist"):
        collected.read(MAZE, 11)


def test_an_interruption_costs_the_unfinished_part_only(folder, played, monkeypatch) -> None:
    counted = scripted.play

    def play(name: str, seed: int) -> Episode:
        if len(played) == 17:
            raise KeyboardInterrupt
        return counted(name, seed)

    monkeypatch.setattr(scripted, "play", play)
    stale = folder / f"{MAZE}-v0" / "part-00002.npz.partial"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a killed run")
    with pytest.raises(KeyboardInterrupt):
        collected.collect(MAZE, 30, workers=1)
    assert [file.name for file in stale.parent.iterdir()] == ["part-00000.npz"]
    monkeypatch.setattr(scripted, "play", counted)
    del played[:]
    collected.collect(MAZE, 30, workers=1)
    assert played == seeds_of(MAZE, *range(10, 30))


def test_a_full_disk_leaves_nothing_behind(folder, played, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        collected.collect(MAZE, 10, workers=1)
    assert list((folder / f"{MAZE}-v0").iterdir()) == []


def test_two_at_once_generate_once(played, monkeypatch) -> None:
    counted = scripted.play

    def play(name: str, seed: int) -> Episode:
        time.sleep(0.02)  # long enough for the other one to arrive
        return counted(name, seed)

    monkeypatch.setattr(scripted, "play", play)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(collected.collect, MAZE, 10, workers=1) for _ in range(2)]
        assert runs[0].result() == runs[1].result()
    assert len(played) == PART_EPISODES


@pytest.mark.parametrize(("episodes", "workers"), [(0, 1), (-1, 1), (1, 0)])
def test_counts_must_be_positive(folder, episodes: int, workers: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        collected.collect(MAZE, episodes, workers=workers)
    assert not folder.exists()


def test_the_folder_can_be_chosen(tmp_path, monkeypatch) -> None:
    (given,) = collected.parts(MAZE, 1, tmp_path)
    assert given == tmp_path / f"{MAZE}-v0" / "part-00000.npz"
    monkeypatch.setenv("FDKERNELS_DATA", "~/somewhere")
    assert collected.default_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("FDKERNELS_DATA")
    assert collected.default_folder() == Path.home() / ".ogbench" / "fdkernels"


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.long("starts processes that import MuJoCo")
def test_workers_make_the_same_episodes(short, tmp_path) -> None:
    threads = os.environ.get("OMP_NUM_THREADS")
    collected.collect("cube-single-noisy", 20, workers=2, folder=tmp_path / "two")
    assert os.environ.get("OMP_NUM_THREADS") == threads
    collected.collect("cube-single-noisy", 20, workers=1, folder=tmp_path / "one")
    one, two = (collected.read("cube-single-noisy", 20, tmp_path / name) for name in ("one", "two"))
    assert_equal(one, two)


@pytest.mark.long("starts processes that import MuJoCo")
def test_a_failing_worker_is_reported(folder, monkeypatch) -> None:
    monkeypatch.setitem(scripted.RECIPES, MAZE, dataclasses.replace(scripted.RECIPES[MAZE], rows="many"))
    with pytest.raises(ChildProcessError, match=f"generated {MAZE} ended early"):
        collected._generate(MAZE, {0: folder / "part-00000.npz"}, 2)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # ended, perhaps while this was read
        return False


COLLECT = "from train.data import collected; collected.collect('pointmaze-large-navigate', 1000, workers=2)"


@pytest.mark.long("starts processes that import MuJoCo")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by Linux's /proc")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_leaves_whole_parts_and_no_processes(folder, kill: signal.Signals) -> None:
    run = subprocess.Popen([sys.executable, "-c", COLLECT], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    children: list[int] = []
    try:
        first = folder / "pointmaze-large-navigate-v0" / "part-00000.npz"
        wait_for(first.exists, "no part was written")
        children = descendants(run.pid)
        assert len([child for child in children if lives(child)]) >= 2
    finally:
        run.send_signal(kill)
        assert run.wait(timeout=PATIENCE) != 0
    wait_for(lambda: not any(map(lives, children)), "a worker lives on")
    whole = sorted(folder.rglob("*.npz"))
    assert 1 <= len(whole) < 100
    collected.read("pointmaze-large-navigate", PART_EPISODES * len(whole))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_says_what_it_makes_and_goes_on(folder, played, capsys) -> None:
    options = ["--env", MAZE, "--workers", "1", "--episodes"]
    assert command.main([*options, "5"]) == 0
    assert command.main([*options, "15"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5:9] == [
        f"data       {MAZE}, 20 episodes of {SHORT - 1} transitions (pointmaze-medium-v0)",
        f"folder     {folder / f'{MAZE}-v0'}",
        "here       10 episodes, 10 to generate",
        lines[8],
    ]
    assert lines[8].startswith(f"done       20 episodes, {20 * (SHORT - 1)} transitions, 0.0 MB")
    assert lines[9].startswith("speed      10 episodes in ")
    assert command.main([*options, "15"]) == 0
    assert "speed" not in capsys.readouterr().out
    assert len(played) == 20


@pytest.mark.parametrize(("name", "message"), [("cube-sinlge-play", "Nearest: cube-single-play"), ("../x", "{play,")])
def test_command_refuses_other_names(folder, capsys, name: str, message: str) -> None:
    assert command.main(["--env", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not folder.exists()


def test_command_without_ogbench_says_how_to_install_it(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scripted.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--env", MAZE]) == 2
    assert "pip install -e '.[ogbench]'" in capsys.readouterr().err
    assert not folder.exists()


def test_command_can_be_stopped(played, monkeypatch, capsys) -> None:
    def stop(name: str, seed: int) -> Episode:
        raise KeyboardInterrupt

    monkeypatch.setattr(scripted, "play", stop)
    assert command.main(["--env", MAZE, "--workers", "1"]) == 130
    assert "goes on" in capsys.readouterr().err
