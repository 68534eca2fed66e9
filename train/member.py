"""One agent of a run: what it was measured to do, and what is kept of it in its folder."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.agents.base import Agent
from train.checkpoint import Checkpoint, save_checkpoint, write_safetensors, write_whole
from train.curve import draw_curve
from train.data.spec import EnvSpec, normalized_score
from train.data.transitions import OfflineDataset
from train.evaluate import ROLES, evaluate
from train.record import Record
from train.settings import RunConfig, role_names


class RunError(RuntimeError):
    """Something the user can mend; shown without a traceback."""


class Member:
    """An agent with its optimiser and generator; ``config`` is that with which it would be trained alone."""

    def __init__(
        self,
        config: RunConfig,
        spec: EnvSpec,
        dataset: OfflineDataset,
        agent: Agent,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self.config, self.spec, self.dataset = config, spec, dataset
        self.agent, self.optimizer, self.generator = agent, optimizer, generator
        self.evaluations: list[dict[str, Any]] = []

    # -- while it is trained -------------------------------------------------------------------------------------

    def open_record(self, step: int) -> None:
        self.record = Record(self.config.folder, step, self.evaluations)

    def log(self, step: int, stage: str, updates_per_second: float, figures: Mapping[str, Tensor]) -> dict[str, float]:
        """One row of metrics, as numbers."""
        numbers = {name: value.item() for name, value in figures.items()}
        self.record.add_metrics(step, stage, updates_per_second, numbers)
        broken = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise RunError(
                f"training diverged before step {step}: {', '.join(broken)} (seed {self.config.seed}, see metrics.csv "
                f"in {self.config.folder})"
            )
        return numbers

    def evaluate(self, step: int, *, last: bool) -> dict[str, dict[str, Any]]:
        """Returns of each of `ROLES` from the same initial states; a row of each."""
        config = self.config
        returns = evaluate(
            self.agent,
            self.spec.env_id,
            config.acts,
            episodes=config.eval_episodes if last else config.interim_episodes or config.eval_episodes,
            # the same initial states at every evaluation, other ones for another seed
            seed=1_000_000 * (config.seed + 1),
        )
        rows = {}
        for role, values in returns.items():
            sem = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            scores = normalized_score(self.spec, values)
            rows[role] = row = {
                "step": step,
                "role": role,
                "return_mean": float(values.mean()),
                "return_sem": float(sem),
                "score_mean": float(scores.mean()),
                "score_sem": float(sem * 100 / (self.spec.expert_return - self.spec.random_return)),
                "episodes": len(values),
            }
            self.evaluations.append(row)
            self.record.add_evaluation(row)
        draw_curve(config.folder, config, self.dataset_score, self.spec.score_label)
        return rows

    # -- what it leaves behind -----------------------------------------------------------------------------------

    def save(self, step: int, seconds: float) -> None:
        notes = {"data": self.data_identity, "evaluations": self.evaluations, "seconds": seconds}
        folder = self.config.folder / "checkpoints"
        save_checkpoint(folder, step, self.agent, self.optimizer, self.generator, notes)

    def restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.notes["data"] != self.data_identity:
            raise RunError(
                f"--resume: {checkpoint.path} was trained on other data: {checkpoint.notes['data']}, "
                f"and now there is {self.data_identity}"
            )
        checkpoint.restore(self.agent, self.optimizer, self.generator)
        self.evaluations = checkpoint.notes["evaluations"]

    @property
    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        returns = zlib.crc32(self.dataset.episode_returns.tobytes())
        return {"ids": list(self.dataset.dataset_ids), "transitions": len(self.dataset), "returns_crc32": returns}

    @property
    def dataset_score(self) -> float:
        return float(normalized_score(self.spec, float(self.dataset.episode_returns.mean())))

    @property
    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The last and the best evaluation of each of `ROLES`."""
        return {
            role: {"last": rows[-1], "best": max(rows, key=lambda row: row["score_mean"])}
            for role in ROLES
            if (rows := [row for row in self.evaluations if row["role"] == role])
        }

    def save_policy(self) -> None:
        """The weights, and what it takes to act with them (``train/play.py``)."""
        config = self.config
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.agent.state_dict().items()}
        hyper = json.dumps(config.as_json()["hyper"])
        header = {"env": config.env, "agent": config.agent, "hyper": hyper}
        header |= {"acting": json.dumps(dataclasses.asdict(config.acts))}
        write_safetensors(config.folder / "policy.safetensors", weights, header)

    def finish(self, seconds: float) -> None:
        """Weights and summary."""
        self.save_policy()
        config = self.config
        summary = {
            "config": config.as_json(),
            "env_id": self.spec.env_id,
            "label": self.spec.score_label,
            "role_names": role_names(config),
            "dataset_ids": self.dataset.dataset_ids,
            "dataset_return": float(self.dataset.episode_returns.mean()),
            "dataset_score": self.dataset_score,
            "seconds": seconds,
            "torch": torch.__version__,
            "acting": dataclasses.asdict(config.acts),
            "results": self.results,
        }
        write_whole(config.folder / "result.json", json.dumps(summary, indent=2) + "\n")
