"""Locomotion through mixed actuators: nothing differs from the plain environments but the coordinates of actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from train.data import locomotion, mixed
from train.data.episode import Episode
from train.data.spec import EnvSpec, Part, Source, Wanted
from train.environments import ENVIRONMENTS, resolve

WIDTHS = {"hopper": 3, "halfcheetah": 6, "walker2d": 6}


def test_names() -> None:
    names = [spec.name for spec in mixed.ENVIRONMENTS]
    assert names == [f"mixed-{spec.name}" for spec in locomotion.ENVIRONMENTS]
    assert set(names) < set(ENVIRONMENTS)
    plain, changed = resolve("hopper-medium"), resolve("mixed-hopper-medium")
    assert [str(source) for source in changed.sources] == [f"{source}, in mixed actions" for source in plain.sources]
    assert changed.scoring == plain.scoring


@pytest.mark.parametrize("d", [1, 3, 6, 17])
def test_mixing(d: int) -> None:
    """Fixed, invertible, with the stated span of gains, and an inverse that keeps actions within the bounds."""
    matrix = mixed.mixing(d)
    inverse = np.linalg.inv(matrix)
    np.testing.assert_array_equal(matrix, mixed.mixing(d))
    np.testing.assert_allclose(matrix @ inverse, np.eye(d), atol=1e-12)
    gains = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose([gains[0] / gains[-1], gains[-1]], [mixed.SPAN if d > 1 else 1, d**0.5])
    corners = np.sign(inverse)  # the worst command for each action
    assert np.abs((inverse * corners).sum(1)).max() <= 1 + 1e-12
    assert d == 1 or np.abs(matrix - np.diag(np.diag(matrix))).max() > 0.1 * np.abs(matrix).max(), "nothing is mixed"


@pytest.mark.parametrize("robot", WIDTHS)
def test_the_same_motor_commands_earn_the_same(robot: str) -> None:
    """For a few steps, after which chaos enlarges the rounding of actions to float32."""
    plain, changed = (gym.make(resolve(f"{prefix}{robot}-medium").env_id) for prefix in ("", "mixed-"))
    assert changed.action_space == gym.spaces.Box(-1.0, 1.0, (WIDTHS[robot],), np.float32)
    assert changed.spec.max_episode_steps == plain.spec.max_episode_steps == 1000
    inverse, rng = np.linalg.inv(mixed.mixing(WIDTHS[robot])), np.random.default_rng(1)
    observation, _ = plain.reset(seed=3)
    same, _ = changed.reset(seed=3)
    np.testing.assert_array_equal(observation, same)
    for _ in range(5):
        command = rng.uniform(-1, 1, WIDTHS[robot])
        observation, reward, *ended, _ = plain.step(command)
        same, earned, *also_ended, _ = changed.step((inverse @ command).astype(np.float32))
        np.testing.assert_allclose(same, observation, atol=1e-4)
        assert earned == pytest.approx(reward, abs=1e-4)
        assert ended == also_ended
    plain.close()
    changed.close()


def test_commands_are_clipped() -> None:
    """An action whose command is out of bounds gives the nearest command within."""
    env = mixed.make("Hopper-v5")
    action = np.ones(3, np.float32)
    command = mixed.mixing(3) @ action
    assert np.abs(command).max() > 1, "the case leaves no bounds"
    np.testing.assert_allclose(env.action(action), np.clip(command, -1, 1))
    env.close()


class Given(Source):
    """A source with one episode."""

    def __init__(self, episode: Any) -> None:
        self.episode, self.asked = episode, []

    def __str__(self) -> str:
        return "given"

    def is_cached(self, wanted: Wanted) -> bool:
        return True

    def whereabouts(self, wanted: Wanted) -> str:
        return "here"

    def load(self, spec: EnvSpec, wanted: Wanted) -> list[Part]:
        self.asked.append(spec.name)
        return [Part("some/id-v0", "from here", [self.episode])]


def test_data_are_the_plain_ones_in_mixed_actions() -> None:
    """Actions are W⁻¹·u in float32 and within the bounds; the rest is passed on as the plain source gives it."""
    rng, wanted, plain = np.random.default_rng(0), None, resolve("hopper-medium")
    actions = rng.uniform(-1, 1, (7, 3)).astype(np.float32)
    episode = Episode(rng.standard_normal((8, 11)), actions, rng.standard_normal(7), np.arange(7) != 6)
    given = Given(episode)
    source = mixed.Mixed(given, plain)
    (part,) = source.load(resolve("mixed-hopper-medium"), wanted)  # type: ignore[arg-type]
    assert given.asked == ["hopper-medium"]
    assert (part.dataset_id, part.origin) == ("some/id-v0", "from here, in mixed actions")
    assert (str(source), source.is_cached(wanted), source.whereabouts(wanted)) == (  # type: ignore[arg-type]
        "given, in mixed actions", True, "here",
    )  # fmt: skip
    (changed,) = part.episodes
    assert changed.actions.dtype == np.float32
    assert np.abs(changed.actions).max() <= 1
    np.testing.assert_allclose(changed.actions @ mixed.mixing(3).T, episode.actions, atol=1e-6)
    for column in ("observations", "rewards", "masks"):
        np.testing.assert_array_equal(getattr(changed, column), getattr(episode, column))


def test_the_behaviour_is_narrow_along_some_directions() -> None:
    """Of commands alike in all directions, actions vary sixty-four times as much along one as along another."""
    commands = np.random.default_rng(0).uniform(-1, 1, (20_000, 6))
    variances = np.linalg.eigvalsh(np.cov((commands @ np.linalg.inv(mixed.mixing(6)).T).T))
    assert variances[-1] / variances[0] == pytest.approx(mixed.SPAN**2, rel=0.1)
