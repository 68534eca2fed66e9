"""Flow Q-learning (arXiv 2502.02538): a one-step policy distilled from the flow while it climbs Q."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fdkernels.policy import OneStepPolicy
from train.agents.base import Agent, Draws
from train.agents.hyperparameters import AgentConfig
from train.data.transitions import Batch


class FQL(OneStepPolicy, Agent):
    """Flow Q-learning: π(s) = clip(μ(s, noise)), kept near the flow's action from the same noise."""

    config: AgentConfig

    title = "FQL"
    summary = "one-step distillation"
    published: ClassVar[Mapping[str, Any]] = {"grad_clip": None}
    # More updates than the others get: one takes less than half of FiDec's time, and the policy is distilled from
    # scratch, while the others start from the flow.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"standard": {"steps": 30_000, "eval_every": 5_000}}

    def next_actions(self, batch: Batch, draws: Draws, flows: dict[str, Tensor]) -> Tensor:
        return self.act(batch.next_observations, draws.next_noise)

    def actor_loss(
        self, batch: Batch, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """α·‖μ(s, noise) − flow(s, noise)‖²/d − Q(s, clip(μ))."""
        base_actions = flows["base"]
        actions = self.one_step(batch.observations, draws.base_noise)
        penalty = F.mse_loss(actions, base_actions)
        policy_actions = actions.clamp(-1, 1)
        q_loss, seen = self.q_loss(batch.observations, policy_actions)
        loss = self.config.alpha * penalty + q_loss
        return loss, {
            **seen,
            "base_actions": base_actions,
            "policy_actions": policy_actions,
            "penalty": penalty,
            "actor_loss": loss,
        }
