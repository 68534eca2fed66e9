"""Names of environments, their scores, and a quiet MuJoCo."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

from train import environments
from train.data.episode import Outcomes
from train.data.generated import Rollouts
from train.data.hosted import Hosted
from train.data.spec import SuccessRate
from train.environments import ENVIRONMENTS, UnknownEnvironment, resolve
from train.simulator import make_vector_env


@pytest.mark.parametrize("family", ["halfcheetah", "hopper", "walker2d"])
@pytest.mark.parametrize(
    ("quality", "parts"),
    [
        ("simple", ["simple"]),
        ("medium", ["medium"]),
        ("expert", ["expert"]),
        ("medium-expert", ["medium", "expert"]),
    ],
)
def test_names_give_environment_and_minari_ids(family: str, quality: str, parts: list[str]) -> None:
    spec = resolve(f"{family}-{quality}")
    assert spec.name == f"{family}-{quality}"
    assert spec.sources == (
        Hosted(tuple(f"mujoco/{family}/{part}-v0" for part in parts)),
        Rollouts(tuple(f"{family}-{part}" for part in parts)),
    )
    assert spec.env_id.lower() == f"{family}-v5"
    assert gym.spec(spec.env_id).max_episode_steps == 1000


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("halfcheetah-medum", "halfcheetah-medium"),
        ("halfcheetah-medium-expert-v2", "halfcheetah-medium-expert"),
        ("HALFCHEETAH-EXPERT", "halfcheetah-expert"),
        ("hoper-expert", "hopper-expert"),
        ("walker-medium", "walker2d-medium"),
    ],
)
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UnknownEnvironment, match=f"Nearest: .*{meant}[,.]") as error:
        resolve(typed)
    assert repr(typed) in str(error.value)


def test_unknown_name_says_how_to_list_all() -> None:
    with pytest.raises(ValueError, match=f"`python train/environments.py` lists all {len(ENVIRONMENTS)}") as error:
        resolve("zzz")
    assert "Nearest" not in str(error.value)
    listing = subprocess.run([sys.executable, environments.__file__], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == list(ENVIRONMENTS)


@pytest.mark.parametrize(
    ("name", "random", "expert"),
    [
        ("halfcheetah-medium", -280.178953, 12135.0),
        ("hopper-simple", -20.272305, 3234.3),
        ("walker2d-medium-expert", 1.629008, 4592.3),
    ],
)
def test_normalized_score_is_d4rls(name: str, random: float, expert: float) -> None:
    scoring = resolve(name).scoring
    returns = np.array([random, (random + expert) / 2, expert, 2 * expert - random])
    np.testing.assert_allclose(scoring(Outcomes(returns, np.zeros(4, bool))), [0, 50, 100, 200], atol=1e-9)


def test_success_rate_counts_episodes_that_reach_the_goal() -> None:
    scores = SuccessRate()(Outcomes(np.array([-200.0, -7.0, -80.0]), np.array([False, True, True])))
    assert scores.tolist() == [0, 100, 100]


def test_mujoco_is_quiet(tmp_path, monkeypatch, capfd, recwarn) -> None:
    monkeypatch.chdir(tmp_path)
    make_vector_env("HalfCheetah-v5", 1).close()
    assert list(tmp_path.iterdir()) == [], "MuJoCo wrote its log into the working folder"
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn if w.category is not ResourceWarning] == []
