"""The behaviour policies behind the embedded data: a tanh-squashed Gaussian MLP in plain numpy, stored in fp16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

POLICIES = Path(__file__).parent / "policies"


class BehaviourPolicy:
    """a = tanh(mean(s) + std(s)·ε), with two hidden ReLU layers.

    Args:
        weights: arrays named as in ``train.behaviour.sac.Actor``, each (outputs, inputs).
    """

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        w = {name: a.astype(np.float32) for name, a in weights.items()}
        self.hidden = [(w[f"trunk.{i}.weight"].T, w[f"trunk.{i}.bias"]) for i in (0, 2)]
        self.heads = (
            np.concatenate([w["mean.weight"], w["log_std.weight"]]).T,
            np.concatenate([w["mean.bias"], w["log_std.bias"]]),
        )

    def __call__(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sample actions (n, action_dim) in [-1, 1] for observations (n, obs_dim)."""
        h = obs.astype(np.float32)
        for weight, bias in self.hidden:
            h = np.maximum(h @ weight + bias, 0)
        mean, log_std = np.split(h @ self.heads[0] + self.heads[1], 2, axis=-1)
        noise = rng.standard_normal(mean.shape, dtype=np.float32)
        return np.tanh(mean + np.exp(np.clip(log_std, -5, 2)) * noise)

    def save(self, path: Path, note: dict[str, str]) -> None:
        """Write the weights, with ``note`` (how the policy was trained, what it scores) as metadata."""
        save_file(self.weights, path, metadata=note)

    @classmethod
    def load(cls, path: Path) -> BehaviourPolicy:
        with safe_open(path, framework="numpy") as f:
            return cls({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118 (not a dict)


def policy_note(path: Path) -> dict[str, str]:
    """The metadata of the weights: environment, return over fresh episodes, training length and seed."""
    with safe_open(path, framework="numpy") as f:
        return f.metadata()
