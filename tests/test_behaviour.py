"""The script that trains the behaviour policies, for a few updates, and the policies that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.behaviour import sac
from train.behaviour.policy import POLICIES, BehaviourPolicy, policy_note
from train.data import locomotion
from train.data.generated import Rollouts


def train(out: Path, **settings: float) -> None:
    small: dict[str, Any] = {"num_envs": 2, "eval_episodes": 2, "hidden": 16, "threads": torch.get_num_threads()}
    sac.main(sac.SACConfig(out=out, **small, **settings))


# one snapshot, after thirteen updates
SHORT = {"env_steps": 2_000, "random_steps": 1_900, "eval_every": 1_950}


def test_a_level_is_named_when_it_is_reached(tmp_path: Path) -> None:
    train(tmp_path, **SHORT, simple_return=-1e6, medium_return=1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "halfcheetah-expert.safetensors",
        "halfcheetah-simple.safetensors",
    ]


def test_of_a_level_the_first_snapshot_is_kept_and_of_experts_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returns = iter([1, 5, 3, float("nan"), 9, 8])
    monkeypatch.setattr(sac, "play", lambda policy, config, seed: np.full(2, float(next(returns)) if seed else 0.0))
    train(tmp_path, env_steps=1_800, random_steps=400, eval_every=300, simple_return=4, medium_return=7)
    kept = {path.stem: policy_note(path)["transitions"] for path in tmp_path.iterdir()}
    assert kept == {"halfcheetah-simple": "600", "halfcheetah-medium": "1500", "halfcheetah-expert": "1500"}


def test_training_writes_policies_that_act_and_say_what_they_score(tmp_path: Path) -> None:
    train(tmp_path, **SHORT, simple_return=1e6, medium_return=1e6)
    path = tmp_path / "halfcheetah-expert.safetensors"
    note = policy_note(path)
    assert (note["transitions"], note["updates"], note["episodes"]) == ("1950", "13", "2")
    assert np.isfinite(float(note["return_mean"]))
    policy, obs = BehaviourPolicy.load(path), np.random.default_rng(0).standard_normal((5, 17))
    actions = policy(obs, np.random.default_rng(1))
    assert actions.shape == (5, 6)
    assert np.abs(actions).max() < 1
    np.testing.assert_array_equal(actions, policy(obs, np.random.default_rng(1)))


def test_the_numpy_policy_is_the_trained_actor() -> None:
    actor = sac.Actor(5, 2, 16)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.copy_(parameter.half())  # as stored
        actor.log_std.weight.zero_()
        actor.log_std.bias.fill_(-100)  # clipped to the smallest spread, which leaves the mean
        obs = torch.randn(7, 5)
        expected = actor.mean(actor.trunk(obs)).tanh()
    ours = actor.behaviour_policy()(obs.numpy(), np.random.default_rng(0))
    np.testing.assert_allclose(ours, expected, atol=5 * np.exp(-5))


def test_every_environment_has_its_policies() -> None:
    for spec in locomotion.ENVIRONMENTS:
        (rollouts,) = (source for source in spec.sources if isinstance(source, Rollouts))
        assert rollouts.policies, spec.name
        for name in rollouts.policies:
            assert (POLICIES / f"{name}.safetensors").exists(), name


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("halfcheetah-simple", 1_500, 3_000),
        ("halfcheetah-medium", 4_500, 6_000),
        ("halfcheetah-expert", 10_000, 20_000),
        ("hopper-simple", 500, 1_100),
        ("hopper-medium", 1_300, 1_800),
        ("hopper-expert", 3_200, 4_000),
        ("walker2d-simple", 600, 1_400),
        ("walker2d-medium", 2_500, 3_300),
        ("walker2d-expert", 4_000, 6_000),
    ],
)
def test_what_ships_is_small_and_as_good_as_its_name(name: str, least: float, most: float) -> None:
    path = POLICIES / f"{name}.safetensors"
    assert path.stat().st_size < 200_000
    assert {weight.dtype for weight in BehaviourPolicy.load(path).weights.values()} == {np.dtype(np.float16)}
    note = policy_note(path)
    assert note["episodes"] == "20"
    assert least < float(note["return_mean"]) < most
    # other episodes come close to the recorded mean
    config = sac.SACConfig(out=Path(), env_id=note["env_id"], eval_episodes=8)
    returns = sac.play(BehaviourPolicy.load(path), config, seed=123)
    away = abs(returns.mean() - float(note["return_mean"]))
    assert away < 4 * np.hypot(returns.std(ddof=1) / 8**0.5, float(note["return_sem"])) + 1
