"""The behaviour policies behind the embedded data: a tanh-squashed Gaussian MLP in plain numpy, stored in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fdkernels.policy.untrusted import check_safetensors

POLICIES = Path(__file__).parent / "policies"
LAYERS: dict[str, str | None] = {"trunk.0": None, "trunk.2": "trunk.0", "mean": "trunk.2", "log_std": "trunk.2"}
"""Each layer, and the one whose outputs are its inputs."""


class BadPolicy(ValueError):
    """A file that is no behaviour policy, or one for another environment; the message names it."""


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

    @property
    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of an observation and of an action."""
        return self.weights["trunk.0.weight"].shape[1:], self.weights["mean.bias"].shape

    def save(self, path: Path, note: dict[str, str]) -> None:
        """Write the weights, with ``note`` (how the policy was trained, what it scores) as metadata."""
        save_file(self.weights, path, metadata=note)

    @classmethod
    def load(cls, path: Path) -> BehaviourPolicy:
        """Read what `save` wrote.

        Raises:
            BadPolicy: the file is damaged, or has other weights.
        """
        try:
            check_safetensors(path)
            with safe_open(path, framework="numpy") as f:
                weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            check_weights(weights)
        except (SafetensorError, TypeError, ValueError) as error:
            raise BadPolicy(f"{path} is no behaviour policy ({type(error).__name__}: {error})") from error
        return cls(weights)


def check_weights(weights: Mapping[str, np.ndarray]) -> None:
    """Refuse weights that are not those of a `BehaviourPolicy`.

    Raises:
        ValueError: one is missing, too many, or has another shape or NaN or infinity.
    """
    wanted = {f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if odd := sorted(weights.keys() ^ wanted):
        raise ValueError(f"it {'lacks' if odd[0] in wanted else 'should not have'} {odd[0]:.100}")
    inputs = weights["trunk.0.weight"].shape[-1:]
    for layer, before in LAYERS.items():
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        if weight.shape != (*bias.shape, *(weights[f"{before}.bias"].shape if before else inputs)) or weight.ndim != 2:
            raise ValueError(f"{layer} has a weight of shape {weight.shape} and a bias of shape {bias.shape}")
    if weights["mean.bias"].shape != weights["log_std.bias"].shape:
        raise ValueError("mean and log_std are not equally wide")
    for name, values in weights.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ValueError(f"{name} has {values.dtype}, NaN or infinity, not finite numbers")


def policy_note(path: Path) -> dict[str, str]:
    """The metadata of the weights: environment, return over fresh episodes, training length and seed."""
    check_safetensors(path)
    with safe_open(path, framework="numpy") as f:
        return f.metadata() or {}
