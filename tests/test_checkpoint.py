"""Checkpoints restore everything; damaged and half-written ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.agents import AGENTS
from train.agents.base import Agent
from train.data.transitions import Batch
from train.outputs.checkpoint import DamagedCheckpoint, newest_checkpoints, read_checkpoint, save_checkpoint

SMALL: dict[str, Any] = {"actor_hidden": (8,), "critic_hidden": (8,), "flow_steps": 2, "num_fisher_samples": 2}


class Trainer:
    def __init__(self, name: str = "fidec", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.agent: Agent = AGENTS[name](AGENTS[name].hyperparameters(**SMALL), 3, 2)
        self.optimizer = self.agent.make_optimizer()
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = (self.agent, self.optimizer, self.generator)

    def update(self, times: int) -> None:
        for _ in range(times):
            obs, actions, rewards, next_obs, masks = (
                torch.randn(16, width, generator=self.generator) for width in (3, 2, 1, 3, 1)
            )
            batch = Batch(obs, actions.clamp(-1, 1), rewards.squeeze(-1), next_obs, masks.squeeze(-1).gt(0).float())
            self.agent.update(self.optimizer, batch, self.agent.draw(16, self.generator))


def weights(agent: Agent) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


@pytest.mark.parametrize("name", AGENTS)
def test_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    straight = Trainer(name)
    straight.update(3)
    path = save_checkpoint(tmp_path, 3, *straight.parts, {"note": [1, 2.5]})
    straight.update(4)

    resumed = Trainer(name, seed=1)  # everything differs until it is loaded
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.notes) == (3, {"note": [1, 2.5]})
    checkpoint.restore(*resumed.parts)
    resumed.update(4)
    for key, tensor in weights(straight.agent).items():
        assert torch.equal(tensor, weights(resumed.agent)[key]), key


def found(folder: Path) -> Path:
    (checkpoint,), problems = newest_checkpoints([folder])
    assert not problems
    return checkpoint.path


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut short":
        content = content[: len(content) // 2]
    elif how == "one bit flipped":
        content[-100] ^= 1
    elif how == "empty":
        content = bytearray()
    elif how == "header gone":
        content[:8] = b"\xff" * 8
    elif how == "header altered":
        assert content.count(b"46.1") == 1
        content = content.replace(b"46.1", b"96.1")
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut short", "one bit flipped", "empty", "header gone", "header altered"])
def test_a_damaged_checkpoint_is_refused_for_the_one_before(tmp_path: Path, how: str) -> None:
    trainer = Trainer()
    before = save_checkpoint(tmp_path, 1, *trainer.parts, {})
    newest = save_checkpoint(tmp_path, 20, *trainer.parts, {"score": 46.1})
    assert found(tmp_path) == newest
    damage(newest, how)
    with pytest.raises(DamagedCheckpoint, match=newest.name):
        read_checkpoint(newest)
    (checkpoint,), problems = newest_checkpoints([tmp_path])
    assert checkpoint.path == before
    assert len(problems) == 1
    assert str(newest) in problems[0]
    # it was set aside, so that new checkpoints are not taken for older ones and dropped
    later = save_checkpoint(tmp_path, 5, *trainer.parts, {})
    assert found(tmp_path) == later
    assert before.exists()


def test_only_the_newest_three_stay(tmp_path: Path) -> None:
    trainer = Trainer()
    for step in (1, 5, 10, 20, 30):
        save_checkpoint(tmp_path, step, *trainer.parts, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{step}.safetensors" for step in (10, 20, 30)]


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    first = save_checkpoint(tmp_path, 1, *trainer.parts, {})
    monkeypatch.setattr(Path, "replace", lambda self, target: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        save_checkpoint(tmp_path, 2, *trainer.parts, {})
    assert found(tmp_path) == first


def test_nothing_to_find(tmp_path: Path) -> None:
    assert newest_checkpoints([tmp_path / "nowhere"]) == ([], [])
