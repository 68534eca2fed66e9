"""The evaluations of one agent, and its summary in result.json."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import fdkernels
from train import processes
from train.data.episode import Outcomes
from train.data.spec import EnvSpec
from train.data.transitions import OfflineDataset
from train.outputs.files import write_whole
from train.settings import RunConfig, role_names


class Result:
    """The evaluations of one agent so far, and the data that it learned from."""

    def __init__(self, config: RunConfig, spec: EnvSpec, dataset: OfflineDataset) -> None:
        self.config, self.spec, self.dataset = config, spec, dataset
        self.evaluations: list[dict[str, Any]] = []

    def add(self, step: int, played: Mapping[str, Outcomes]) -> dict[str, dict[str, Any]]:
        """Add a row for each role, from the episodes that it played at this step; returns the rows."""
        rows = {}
        for role, outcomes in played.items():
            row: dict[str, Any] = {"step": step, "role": role}
            for name, values in (("return", outcomes.returns), ("score", self.spec.scoring(outcomes))):
                row[f"{name}_mean"] = float(values.mean())
                row[f"{name}_sem"] = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
            rows[role] = {**row, "episodes": len(values)}
        self.evaluations += rows.values()
        return rows

    @property
    def last_and_best(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The last and the best evaluation of each of the `ROLES`; ``offline`` is the one before going online."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.evaluations:
            of_role = found.setdefault(row["role"], {"last": row, "best": row})
            of_role["last"] = row
            of_role["best"] = max(of_role["best"], row, key=lambda row: row["score_mean"])
            if self.config.online_steps and row["step"] == self.config.offline_steps:
                of_role["offline"] = row
        return found

    @property
    def last_three(self) -> dict[str, float]:
        """The policy's mean score over its last three evaluations, as published tables have it.

        Empty if there are fewer with as many episodes as the last. The agent has learned before each of them; after
        going online, online.
        """
        config = self.config
        rows = [row for row in self.evaluations if row["role"] == "policy"]
        online = bool(rows) and rows[-1]["step"] > config.offline_steps
        start = config.offline_steps if online else config.flow_warmup + config.critic_warmup
        rows = [row for row in rows if row["step"] > start][-3:]
        if len(rows) < 3 or len({row["episodes"] for row in rows}) > 1:
            return {}
        return {"score_mean": float(np.mean([row["score_mean"] for row in rows])), "first_step": rows[0]["step"]}

    @property
    def dataset_return(self) -> float:
        """Mean return of the data's own episodes."""
        return float(self.dataset.outcomes.returns.mean())

    @property
    def dataset_score(self) -> float:
        return float(self.spec.scoring(self.dataset.outcomes).mean())

    @property
    def data_identity(self) -> dict[str, Any]:
        """Identifies the data, which a resumed run must find unchanged."""
        returns = zlib.crc32(self.dataset.outcomes.returns.tobytes())
        return {"ids": list(self.dataset.dataset_ids), "transitions": len(self.dataset), "returns_crc32": returns}

    def write(self, seconds: float) -> dict[str, Any]:
        """Write result.json, which ``train/compare.py`` reads; returns what is in it."""
        config = self.config
        summary = {
            "config": config.as_json(),
            "env_id": self.spec.env_id,
            "label": self.spec.score_label,
            "role_names": role_names(config),
            "dataset_ids": self.dataset.dataset_ids,
            "dataset_return": self.dataset_return,
            "dataset_score": self.dataset_score,
            "seconds": seconds,
            "processes": processes.place().total,
            "fdkernels": fdkernels.__version__,
            "torch": torch.__version__,
            "acting": dataclasses.asdict(config.acts),
            "results": self.last_and_best,
            "last_three": self.last_three,
        }
        write_whole(config.folder / "result.json", json.dumps(summary, indent=2) + "\n")
        return summary
