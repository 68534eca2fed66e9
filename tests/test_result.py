"""The summary of a run: scores, and the mean of the last evaluations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from train.data.episode import Outcomes
from train.data.synthetic import random_dataset
from train.environments import resolve
from train.outputs.report import final_table
from train.outputs.result import Result
from train.presets import preset_config

MAZE = "pointmaze-large-navigate-singletask-v0"


def result_of(successes: list[list[bool]]) -> Result:
    """One evaluation each 100 steps."""
    config = dataclasses.replace(preset_config("full", "fidec", MAZE), env=MAZE)
    result = Result(config, resolve(MAZE), random_dataset(20, 2, 2))
    for i, reached in enumerate(successes):
        outcomes = Outcomes(np.where(reached, -100.0, -1000.0), np.array(reached))
        result.add(100 * (i + 1), {role: outcomes for role in ("policy", "sample", "flow")})
    return result


def test_success_rates_are_scores() -> None:
    row = result_of([[True, True, False, True]]).evaluations[0]
    assert (row["score_mean"], row["return_mean"], row["episodes"]) == (75, -325, 4)
    assert row["score_sem"] == pytest.approx(25)
    assert row["return_sem"] == pytest.approx(225)


def test_the_last_three_evaluations_are_averaged() -> None:
    result = result_of([[True, True], [False, False], [True, False], [True, True]])
    assert result.last_three == {"score_mean": 50, "first_step": 200}
    assert "Mean of the last three evaluations, from step 200: 50.0" in final_table(result, 1.0)


def test_evaluations_before_the_agent_learns_do_not_count() -> None:
    result = result_of([[True], [False], [False]])
    config = dataclasses.replace(result.config, flow_warmup=60, critic_warmup=40)
    result.config = config  # the first evaluation is of the warm-ups
    assert result.last_three == {}
    result.config = dataclasses.replace(config, steps=100, online_steps=100)
    assert result.last_three == {}, "one of these is offline, one online"


@pytest.mark.parametrize("successes", [[[True], [True]], [[True], [True, True], [True, True]]])
def test_no_average_of_fewer_or_of_shorter_ones(successes: list[list[bool]]) -> None:
    result = result_of(successes)
    assert result.last_three == {}
    assert "last three" not in final_table(result, 1.0)
