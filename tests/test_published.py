"""The published settings of tasks."""

from __future__ import annotations

import re

import pytest

from train import run
from train.agents import AGENTS
from train.data import published
from train.environments import ENVIRONMENTS
from train.presets import preset_config


def test_every_row_is_for_a_task_and_an_agent() -> None:
    for row in published.TABLE:
        assert row.agent in AGENTS
        tasks = [name for name in ENVIRONMENTS if published.row_of(name, row.agent, row.online) is row]
        assert tasks, f"{row} is for no task"


@pytest.mark.parametrize(
    ("agent", "task", "wanted"),
    [
        ("fidec", "antmaze-large-navigate-singletask-task3-v0", ("min", 0.01, 0.99, True)),
        ("fidec", "antmaze-giant-navigate-singletask-v0", ("min", 0.01, 0.995, True)),
        ("fidec", "humanoidmaze-medium-navigate-singletask-task1-v0", ("mean", 0.001, 0.995, True)),
        ("fidec", "humanoidmaze-large-stitch-singletask-v0", ("mean", 0.001, 0.995, True)),
        ("fidec", "antsoccer-arena-navigate-singletask-v0", ("mean", 0.01, 0.995, True)),
        ("fidec", "cube-single-play-singletask-v0", ("mean", 0.001, 0.99, True)),
        ("fidec", "cube-double-play-singletask-v0", ("mean", 0.001, 0.99, True)),
        ("fidec", "scene-play-singletask-v0", ("mean", 0.001, 0.99, True)),
        ("fidec", "puzzle-3x3-play-singletask-v0", ("mean", 0.005, 0.99, True)),
        ("fidec", "puzzle-4x4-play-singletask-task5-v0", ("mean", 0.005, 0.99, True)),
        ("fidec", "puzzle-4x6-play-singletask-v0", ("mean", 0.001, 0.99, False)),
    ],
)
def test_full_preset_of_fidec(agent: str, task: str, wanted: tuple[str, float, float, bool]) -> None:
    config = preset_config("full", agent, task)
    hyper = config.hyper
    assert (hyper.q_aggregation, hyper.target_divergence, hyper.discount, hyper.normalize_q) == wanted
    assert (config.steps, config.eval_every, config.eval_episodes, config.batch_size) == (1_000_000, 100_000, 50, 256)


@pytest.mark.parametrize(
    ("task", "alpha", "discount", "aggregation"),
    [
        ("antmaze-large-navigate-singletask-v0", 10, 0.99, "min"),
        ("humanoidmaze-large-navigate-singletask-v0", 30, 0.995, "mean"),
        ("scene-play-singletask-v0", 300, 0.99, "mean"),
        ("puzzle-4x4-play-singletask-v0", 1000, 0.99, "mean"),
    ],
)
def test_full_preset_of_fql(task: str, alpha: float, discount: float, aggregation: str) -> None:
    hyper = preset_config("full", "fql", task).hyper
    assert (hyper.alpha, hyper.discount, hyper.q_aggregation) == (alpha, discount, aggregation)
    assert not hyper.normalize_q


@pytest.mark.parametrize(
    ("name", "alpha", "aggregation"),
    [
        ("antmaze-umaze", 10, "mean"),
        ("antmaze-medium-diverse", 10, "mean"),
        ("antmaze-large-play", 3, "mean"),
        ("pen-human", 10_000, "min"),
        ("pen-expert", 3_000, "min"),
        ("door-cloned", 30_000, "min"),
        ("hammer-cloned", 10_000, "min"),
        ("hammer-human", 30_000, "min"),
        ("relocate-human", 10_000, "min"),
        ("relocate-expert", 30_000, "min"),
    ],
)
def test_full_presets_of_d4rl(name: str, alpha: float, aggregation: str) -> None:
    config = preset_config("full", "fql", name)
    assert (config.steps, config.hyper.alpha, config.hyper.q_aggregation) == (500_000, alpha, aggregation)
    deflow = preset_config("full", "deflow", name).hyper
    assert deflow.normalize_q
    assert deflow.target_divergence == {"ant": 0.015, "pen": 0.01}.get(name[:3], 0.001)
    assert published.row_of(name, "fidec") is None, "nothing is known to be published"


@pytest.mark.parametrize(
    ("task", "offline", "online"),
    [
        ("humanoidmaze-medium-navigate-singletask-v0", (30, 0.995, "mean", 1_000_000), (100, 0.995, "mean", 1_000_000)),
        ("humanoidmaze-large-navigate-singletask-v0", (30, 0.995, "mean", 1_000_000), (30, 0.995, "mean", 1_000_000)),
        ("antsoccer-arena-navigate-singletask-v0", (10, 0.995, "mean", 1_000_000), (30, 0.995, "mean", 1_000_000)),
        ("cube-double-play-singletask-v0", (300, 0.99, "mean", 1_000_000), (300, 0.99, "mean", 1_000_000)),
        ("antmaze-large-play", (3, 0.99, "mean", 500_000), (3, 0.99, "mean", 1_000_000)),
        ("pen-cloned", (10_000, 0.99, "min", 500_000), (1_000, 0.99, "min", 1_000_000)),
        ("hammer-cloned", (10_000, 0.99, "min", 500_000), (1_000, 0.99, "min", 1_000_000)),
        ("relocate-cloned", (30_000, 0.99, "min", 500_000), (10_000, 0.99, "min", 1_000_000)),
        ("relocate-human", (10_000, 0.99, "min", 500_000), (10_000, 0.99, "min", 500_000)),
    ],
)
def test_runs_that_go_online_have_rows_of_their_own(task: str, offline: tuple, online: tuple) -> None:
    for flags, wanted in (([], offline), (["--online-steps", "5"], online)):
        config = run.parse(["--env", task, "--agent", "fql", "--preset", "full", *flags])
        hyper = config.hyper
        assert (hyper.alpha, hyper.discount, hyper.q_aggregation, config.steps) == wanted
    row = published.row_of(task, "fql", online=True)
    line = published.describe(task, "fql", online=True)
    assert f"alpha {float(online[0])}" in line
    assert line.endswith(", offline to online)" if row is not None and row.online else ", offline)")


@pytest.mark.parametrize("spelling", ["--online-steps=5000", "--online_steps 5000", "--online-steps 5_000"])
def test_a_run_that_goes_online_is_known_however_it_is_typed(spelling: str) -> None:
    task = ["--env", "pointmaze-medium-navigate-singletask-v0", "--preset", "quick"]
    config = run.parse([*task, *spelling.split()])
    assert (config.online_steps, config.replay, config.online_lr) == (5000, "balanced", 3e-4)


def test_other_presets_do_not_change_and_flags_win() -> None:
    task = "antmaze-giant-navigate-singletask-v0"
    assert published.changes(task, "quick", "fidec") == {}
    hyper = preset_config("quick", "fidec", task).hyper
    assert (hyper.q_aggregation, hyper.discount, hyper.freeze_critic_after) == ("mean", 0.995, 0), "goals.py's"
    assert preset_config("quick", "fidec", "hopper-medium").hyper.freeze_critic_after is None
    config = run.parse(["--env", task, "--preset", "full", "--discount", "0.9"])
    assert (config.hyper.discount, config.hyper.q_aggregation) == (0.9, "min")


@pytest.mark.parametrize("preset", ["quick", "standard"])
def test_presets_for_cpus_suit_tasks_that_pay_at_a_goal(preset: str) -> None:
    cube, maze = "cube-single-play-singletask-v0", "pointmaze-medium-navigate-singletask-v0"
    for task in (cube, maze, "antmaze-umaze"):
        config = preset_config(preset, "fidec", task)
        frozen = None if task == maze else 0
        assert (config.n_step, config.critic_warmup_n_step, config.hyper.freeze_critic_after) == (50, 50, frozen)
        assert (config.online_lr, config.replay) == (None, "all"), "refused without online steps"
        online = preset_config(preset, "fidec", task, 7)
        assert (online.online_steps, online.n_step, online.online_lr, online.replay) == (7, 50, 3e-4, "balanced")
    targets = {(agent, task): preset_config(preset, agent, task).hyper for agent in AGENTS for task in (cube, maze)}
    for (agent, task), hyper in targets.items():
        wide = agent != "fql" and task == maze
        assert (hyper.alpha, hyper.target_divergence) == ((3e-3, 1.0) if wide else (1.0, 1e-3))
    full = preset_config("full", "fidec", maze, 7)
    assert (full.n_step, full.online_lr, full.replay, full.hyper.alpha) == (1, None, "all", 10.0)
    hopper = preset_config(preset, "fidec", "hopper-medium", 7)
    assert (hopper.n_step, hopper.online_lr, hopper.replay) == (1, 3e-4, "all")


def test_the_row_is_printed_with_its_source() -> None:
    line = published.describe("antmaze-giant-navigate-singletask-v0", "fidec")
    for part in ("q_aggregation min", "discount 0.995", "target_divergence 0.01", "2604.17919"):
        assert part in line
    assert re.search("no published settings of deflow for hopper-medium", published.describe("hopper-medium", "deflow"))
