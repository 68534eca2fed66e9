"""Every setting of a run. The fields are the command line; their docstrings are its help."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import tyro


def _require_finite(config: object) -> None:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        _require(field.name, value, not isinstance(value, float) or math.isfinite(value), "finite")


def _require(name: str, value: object, holds: bool, wants: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {wants}, got {value}")


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Hyper-parameters of an agent; the defaults are the published ones, but for the score convention."""

    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the flow and of the displacement (or one-step) network."""
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of both critics."""
    actor_layer_norm: bool = False
    """Layer norm in flow and displacement network."""
    critic_layer_norm: bool = True
    """Layer norm in the critics."""
    lr: float = 3e-4
    """Adam's learning rate, for everything."""
    grad_clip: float | None = 5.0
    """Bound of the global gradient norm; None leaves it (FQL's published setting)."""
    discount: float = 0.99
    """γ."""
    tau: float = 0.005
    """Rate of the target critics."""
    q_aggregation: Literal["mean", "min"] = "mean"
    """How the two target critics are combined."""
    normalize_q: bool = False
    """Divide the Q term of the actor loss by the batch mean of |Q|."""
    flow_steps: int = 10
    """Euler steps of the flow."""
    freeze_flow_after: int | None = None
    """Stop the flow-matching loss after this many updates of the agent."""

    alpha: float = 10.0
    """Weight of the penalty: where the multiplier starts, or the constant weight without one."""
    lagrange: bool = True
    """Adapt the weight so that the penalty meets target_divergence (fidec, deflow)."""
    target_divergence: float = 1e-3
    """Size of the trust region: mean of δᵀF̂δ/d (fidec) or ‖δ‖²/d (deflow)."""
    zero_init_displacement: bool = False
    """Start with δ = 0, so that refinement begins at the behaviour flow (fidec, deflow)."""

    num_fisher_samples: int = 4
    """K, samples of the flow per state (fidec)."""
    fisher_t: float = 0.95
    """Time at which the score is taken."""
    fisher_t_width: float = 0.0
    """Draw that time uniformly from [fisher_t − width, fisher_t)."""
    fisher_damping: float = 1e-3
    """λ, added to the diagonal of F."""
    fisher_trace_eps: float = 1e-6
    """Lower bound of tr F / d in the normalisation."""
    min_sigma: float = 1e-6
    """Lower bound of 1 − t in the score."""
    score_convention: Literal["exact", "velocity"] = "exact"
    """exact: (t·v − x)/(1 − t), the score. velocity: v/(1 − t), what the published code uses."""

    def __post_init__(self) -> None:
        _require_finite(self)
        freeze = self.freeze_flow_after
        _require("freeze_flow_after", freeze, freeze is None or freeze >= 0, "zero or more")
        for name in ("lr", "alpha", "flow_steps", "num_fisher_samples", "fisher_trace_eps"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("target_divergence", "fisher_damping", "fisher_t_width", "min_sigma"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "zero or more")
        for name in ("discount", "tau"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "between 0 and 1")
        _require("fisher_t", self.fisher_t, 0 <= self.fisher_t < 1, "at least 0 and below 1")
        for name in ("actor_hidden", "critic_hidden"):
            _require(name, getattr(self, name), all(width > 0 for width in getattr(self, name)), "positive widths")
        _require("grad_clip", self.grad_clip, self.grad_clip is None or self.grad_clip > 0, "positive")


MAY_CHANGE_ON_RESUME = {
    *("steps", "preset", "device", "out", "resume", "overwrite"),
    *("eval_every", "eval_episodes", "log_every", "checkpoint_every"),
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Train an offline RL agent on Minari data and evaluate it in MuJoCo."""

    env: str
    """What to learn, such as halfcheetah-medium-expert; `python train/environments.py` lists the names."""
    agent: Literal["fidec", "deflow", "fql"] = "fidec"
    """fidec: Fisher trust region; deflow: isotropic trust region; fql: one-step distillation."""
    preset: Literal["auto", "quick", "full"] = "auto"
    """full: the published setting. quick: minutes on a laptop's CPU. auto: quick where no GPU is used.
    Flags given beside it win."""
    steps: int = 1_000_000
    """Updates of the agent, after the warm-ups."""
    flow_warmup: int = 0
    """Updates before that of the flow alone. Not in the published schedule."""
    critic_warmup: int = 0
    """Updates between the two of the critics alone, on the data's own next actions. Not in the published schedule."""
    warmup_lr: float = 1e-3
    """Learning rate at the start of each warm-up; it falls along half a cosine to a twentieth of that."""
    batch_size: int = 256
    """Transitions per update."""
    seed: int = 0
    """Of everything drawn: parameters, batches, noise, evaluation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Folder of the run; runs/ENV/AGENT-seedN when not given."""
    resume: bool = False
    """Go on from the last checkpoint in the folder, if there is one."""
    overwrite: bool = False
    """Delete what another run left in the folder."""
    eval_every: int = 100_000
    """Updates between evaluations; also evaluated at the end."""
    eval_episodes: int = 50
    """Episodes per evaluation, played side by side."""
    log_every: int = 5_000
    """Updates between rows of metrics."""
    checkpoint_every: int = 50_000
    """Updates between checkpoints; also written at the end and on Ctrl-C."""
    dataset_size: Literal["default", "full"] = "default"
    """Size of generated data: 100 or 1,000 episodes per behaviour policy. Downloaded data is always whole."""
    standardize_observations: bool = False
    """Shift and scale observations by the dataset's mean and standard deviation."""
    scale_rewards: bool = False
    """Divide rewards by the dataset's standard deviation."""
    center_critics: bool = False
    """Start both critics at the dataset's mean reward / (1 − γ) instead of near 0, so that they need not climb."""
    hyper: AgentConfig = AgentConfig()
    """Hyper-parameters."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require("seed", self.seed, self.seed >= 0, "zero or more")
        for name in ("steps", "batch_size", "eval_every", "eval_episodes", "log_every", "checkpoint_every"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _require("discount", self.hyper.discount, self.hyper.discount < 1 or not self.center_critics, "below 1 here")
        _require("warmup_lr", self.warmup_lr, self.warmup_lr > 0, "positive")
        for name in ("flow_warmup", "critic_warmup"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "zero or more")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.env / f"{self.agent}-seed{self.seed}"

    def as_json(self) -> dict[str, Any]:
        """As JSON gives it back: lists for tuples, text for paths."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def choose_preset(name: str, device: str) -> str:
    """What ``auto`` stands for: full on a GPU, quick without one."""
    if name != "auto":
        return name
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "full" if on_gpu else "quick"


def preset_config(name: str, agent: str) -> RunConfig:
    """The settings behind ``--preset quick`` and ``full``."""
    hyper = AgentConfig(grad_clip=None if agent == "fql" else 5.0)
    if name != "quick":
        return RunConfig(env=tyro.MISSING, hyper=hyper)
    # Measured on two CPU cores. The flow is trained first: jointly from scratch, a few thousand updates leave it far
    # from the data. Then the critics, which decide how far the refinement can go: after 3,000 updates following their
    # gradient gains nothing, after 10,000 it does, and a trust region of 1.5e-3 or more already leads astray.
    return RunConfig(
        env=tyro.MISSING,
        steps=1_000,
        flow_warmup=20_000,
        critic_warmup=10_000,
        eval_every=500,
        eval_episodes=20,
        log_every=100,
        checkpoint_every=1_000,
        standardize_observations=True,
        scale_rewards=True,
        center_critics=True,
        hyper=dataclasses.replace(
            hyper,
            actor_hidden=(256,) * 3,
            critic_hidden=(256,) * 2,
            discount=0.95,
            normalize_q=True,
            flow_steps=5,
            num_fisher_samples=2,
            zero_init_displacement=True,
            alpha=1.0,
            target_divergence=5e-4,
        ),
    )
