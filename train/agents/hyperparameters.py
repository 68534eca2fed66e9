"""The hyper-parameters of an agent; ``train/settings.py`` holds the settings of the run around it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fdkernels.policy import PolicyConfig
from fdkernels.policy.config import MOST_STEPS


def require_finite(config: object) -> None:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        require(field.name, value, not isinstance(value, float) or math.isfinite(value), "finite")


def require(name: str, value: object, holds: bool, wants: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {wants}, got {value}")


@dataclasses.dataclass(frozen=True)
class AgentConfig(PolicyConfig):
    """Hyper-parameters of an agent; the defaults are the published ones, except for the score convention."""

    lr: float = 3e-4
    """Adam's learning rate, the same for all parameters."""
    grad_clip: float | None = 5.0
    """Clip the global gradient norm to this. None: no clipping (FQL's published setting)."""
    augment: float = 0.0
    """Probability that the images of a batch are moved, each by up to 3 pixels at random."""
    discount: float = 0.99
    """The discount γ."""
    tau: float = 0.005
    """τ, the rate at which the target critics follow the critics."""
    q_aggregation: Literal["mean", "min"] = "mean"
    """How the two target critics are combined."""
    normalize_q: bool = False
    """Divide the Q term of the actor loss by the batch mean of |Q|."""
    flow_precision: Literal["highest", "high", "bf16"] | None = None
    """Precision of the matrix products when training integrates the flow, which needs no gradient. None: as everywhere
    else. bf16: bfloat16 with float32 sums, faster on hardware with bfloat16 units."""
    freeze_flow_after: int | None = None
    """Stop the flow-matching loss after this many updates of the agent; Adam's momentum still moves the flow for a
    while. 0 leaves the flow exactly as its warm-up left it. Online updates train it all the same, unless
    --freeze-flow-online."""
    freeze_critic_after: int | None = None
    """Stop the critics' loss after this many updates of the agent. 0 keeps the warm-up's critics of the behaviour: one
    step of policy improvement, with critics that do not follow the policy (arXiv 2106.08909). Online updates train them
    all the same."""

    alpha: float = 10.0
    """Weight of the penalty: the initial value with lagrange, constant without."""
    lagrange: bool = True
    """Adapt the weight so that the penalty meets target_divergence (fidec, deflow)."""
    target_divergence: float = 1e-3
    """Size of the trust region: the mean of δᵀF̂δ/d (fidec, or what its --metric measures) or ‖δ‖²/d (deflow)."""
    zero_init_displacement: bool = False
    """Start with δ = 0, so that refinement begins at the behaviour flow (fidec, deflow)."""

    num_fisher_samples: int = 4
    """K, the flow samples per state (fidec)."""
    fisher_t: float = 0.95
    """Time t at which the score is taken."""
    fisher_t_width: float = 0.0
    """Draw the score's time uniformly from [fisher_t − width, fisher_t)."""
    fisher_damping: float = 1e-3
    """λ, added to the diagonal of F."""
    fisher_trace_eps: float = 1e-6
    """Lower bound of tr F / d in the normalisation."""
    min_sigma: float = 1e-6
    """Lower bound of 1 − t in the score."""
    score_convention: Literal["exact", "velocity"] = "exact"
    """exact: (t·v − x)/(1 − t), the score. velocity: v/(1 − t), as in the published code."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("freeze_flow_after", "freeze_critic_after"):
            require(name, getattr(self, name), (value := getattr(self, name)) is None or value >= 0, "zero or more")
        for name in ("lr", "alpha", "flow_steps", "num_fisher_samples", "fisher_trace_eps", "frame_stack"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("target_divergence", "fisher_damping", "fisher_t_width", "min_sigma"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "zero or more")
        for name in ("discount", "tau", "augment"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "between 0 and 1")
        require("flow_steps", self.flow_steps, self.flow_steps <= MOST_STEPS, f"at most {MOST_STEPS:,}")
        require("fisher_t", self.fisher_t, 0 <= self.fisher_t < 1, "at least 0 and below 1")
        for name in ("actor_hidden", "critic_hidden"):
            require(name, getattr(self, name), all(width > 0 for width in getattr(self, name)), "positive widths")
        require("grad_clip", self.grad_clip, self.grad_clip is None or self.grad_clip > 0, "positive")
        super().__post_init__()
