"""Playing a finished run from the command line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fdkernels.policy import Acting, load_policy
from train import play
from train.agents import AGENTS
from train.evaluate import evaluate
from train.outputs.policy import save_policy
from train.settings import RunConfig

SMALL: dict[str, Any] = {"actor_hidden": (16, 16), "critic_hidden": (16,), "flow_steps": 2}


def finished(folder: Path, agent: str = "fidec", **acting: object) -> Path:
    """The folder of a finished run whose agent has learned nothing."""
    hyper = AGENTS[agent].hyperparameters(**SMALL)
    config = RunConfig("hopper-medium", agent=agent, out=folder, hyper=hyper, **acting)  # type: ignore[arg-type]
    learner = AGENTS[agent](hyper, 11, 3)
    torch.nn.init.normal_(learner.obs_mean)
    folder.mkdir()
    save_policy(config, learner)
    return folder


@pytest.mark.parametrize("agent", AGENTS)
def test_plays_what_was_trained(agent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run", agent, acting="mean-flow-of-n", acting_samples=3)
    policy = load_policy(run / "policy.safetensors")
    assert (policy.env, policy.acting) == ("hopper-medium", Acting("mean-flow-of-n", 3))
    weights = load_file(run / "policy.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.network.state_dict().items())

    for options, acting in (
        ((), policy.acting),
        (("--acting", "sample"), Acting("sample", 3)),
        (("--acting", "best-flow-of-n", "--acting-samples", "2"), Acting("best-flow-of-n", 2)),
    ):
        assert play.main([str(run), "--episodes", "2", "--seed", "7", *options]) == 0
        printed = capsys.readouterr().out.splitlines()
        returns = evaluate(policy.network, "Hopper-v5", acting, episodes=2, seed=7)["policy"]
        assert [line.split()[1] for line in printed[1:3]] == [f"{value:,.0f}" for value in returns.returns]
        assert printed[3].startswith(f"{acting} in Hopper-v5: score ")


def test_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in renderer avoids the graphics driver."""
    import gymnasium as gym
    import imageio.v3 as imageio

    monkeypatch.delenv("MUJOCO_GL", raising=False)  # which playing sets
    run = finished(tmp_path / "run")
    shades = itertools.cycle(range(0, 250, 10))

    class Rendered(gym.Wrapper):
        def render(self) -> np.ndarray:
            return np.full((play.HEIGHT, play.WIDTH, 3), next(shades), np.uint8)

    make = gym.make
    monkeypatch.setattr(gym, "make", lambda env_id, **options: Rendered(make(env_id)))
    film = tmp_path / "a" / "hop.gif"
    assert play.main([str(run), "--episodes", "1", "--record", str(film), "--seconds", "0.12"]) == 0
    assert make("Hopper-v5").metadata["render_fps"] == 125, "of which a GIF shows every fifth"
    assert imageio.imread(film, index=None).shape == (3, play.HEIGHT, play.WIDTH, 3)
    assert imageio.immeta(film, index=0)["duration"] == 40
    assert "hop.gif: 0.1 s" in capsys.readouterr().out
    assert play.main([str(run), "--episodes", "1", "--record", str(tmp_path / "hop.nothing")]) == 2
    assert "error: --record" in capsys.readouterr().err

    def breaks_off(path: Path, frames: np.ndarray, **options: object) -> None:
        path.write_bytes(b"GIF89a")
        raise OSError("no space left")

    before = film.read_bytes()
    monkeypatch.setattr(imageio, "imwrite", breaks_off)
    assert play.main([str(run), "--episodes", "1", "--record", str(film)]) == 2
    assert f"error: --record {film}: OSError: no space left" in capsys.readouterr().err
    assert list(film.parent.iterdir()) == [film]
    assert film.read_bytes() == before


def test_exports_what_it_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished(tmp_path / "run", "fql") / "policy.safetensors"
    graph = tmp_path / "graphs" / "hopper.pt2"
    assert play.main([str(file), "--episodes", "1", "--acting", "best-flow-of-n", "--export", str(graph)]) == 0
    assert f"{graph}: {graph.stat().st_size / 1e6:.1f} MB" in capsys.readouterr().out
    policy, noise, obs = load_policy(file, acting="best-flow-of-n"), torch.randn(4, 10, 3), torch.randn(4, 11)
    wanted = policy.acting(policy.network, policy.network.observe(obs), noise)
    torch.testing.assert_close(torch.export.load(graph).module()(obs, noise), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        play.main([str(file), "--export", "hopper.pt"])
    message = "--export must be a file ending in .pt2 or .onnx, got hopper.pt"
    assert message in " ".join(capsys.readouterr().err.split()), "lines are wrapped"


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert play.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "is not there (a run writes its policy when it has finished)" in error(str(tmp_path))
    fql = finished(tmp_path / "fql", "fql")
    refused = error(str(fql), "--acting", "best-of-n")
    assert f"{fql}: Policy: acting='best-of-n' refines an action, and a one-step policy has nothing" in refused
    for flag, value, message in (
        ("--episodes", "0", "--episodes must be positive, got 0"),
        ("--seed", str(2**63), f"--seed must be zero or more, and at most {2**63 - 1}, got {2**63}"),
        ("--acting-samples", "10001", "--acting-samples: Acting: num_samples must be at most 10000, got 10001"),
        ("--acting-temperature", "inf", "--acting-temperature: Acting: temperature must be finite and > 0, got inf"),
    ):
        with pytest.raises(SystemExit):
            play.main([str(fql), flag, value])
        assert message in " ".join(capsys.readouterr().err.split()), "lines are wrapped"
    assert play.main([str(fql), "--episodes", "1", "--seed", str(2**63 - 1)]) == 0
    capsys.readouterr()
    file = fql / "policy.safetensors"
    # cloned, because load_file maps the file, which is cut short next
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(file.read_bytes()[:1000])
    assert "is no policy of this version" in error(str(fql))
    header = {"env": "hopper-medium", "agent": "fql", "hyper": json.dumps({"alhpa": 1})}
    save_file(weights, file, metadata=header)
    assert "is no policy of this version (KeyError: 'acting'" in error(str(fql))
