"""Agents that add a displacement δ to the flow's action, inside a trust region; subclasses measure the size of δ."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdkernels.policy import DisplacementPolicy
from train.agents.base import Agent, Draws, Panel, Parts
from train.agents.hyperparameters import AgentConfig
from train.data.transitions import Batch


class DecoratorAgent(DisplacementPolicy, Agent):
    """π(s) = clip(a + δ(s, a)) for the flow's action a, with the size of δ held at ``target_divergence``."""

    config: AgentConfig

    integrates_next = True
    panels = (
        Panel(
            "size of the displacement",
            {"penalty": "penalty", "displacement_mean_square": "mean ‖δ‖²/d"},
            log_scale=True,
            target="target_divergence",
        ),
        *Agent.panels[1:],
    )

    @classmethod
    def flow_evaluations(cls, config: AgentConfig, action_dim: int) -> int:
        return 2 * config.flow_steps

    def __init__(self, config: AgentConfig, observation: int | Sequence[int], action_dim: int) -> None:
        super().__init__(config, observation, action_dim)
        if config.lagrange:
            # on the CPU even if the rest is made on "meta", where a logarithm takes seconds to import the compiler
            self.log_alpha = nn.Parameter(torch.tensor(float(config.alpha), device="cpu").log())
        if config.zero_init_displacement:
            nn.init.zeros_(self.actor[-1].weight)  # type: ignore[arg-type]

    def starts(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """Adds ``next``, the flow action in the critic's target."""
        starts = super().starts(batch, draws, parts)
        if "critic" in parts:
            starts["next"] = draws.next_noise, batch.next_observations
        return starts

    @torch.no_grad()
    def next_actions(self, batch: Batch, draws: Draws, flows: dict[str, Tensor]) -> Tensor:
        return self.refine(batch.next_observations, flows["next"])

    @abc.abstractmethod
    def penalty(
        self, obs: Tensor, displacement: Tensor, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The size of each displacement, (B,), and the tensors to log. Only the displacement gets a gradient.

        ``obs`` is the flow's view of the observations.
        """

    def actor_loss(
        self, batch: Batch, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """α·penalty − Q(s, clip(a + δ)); α rises while the penalty is above its target (dual ascent)."""
        base_actions = flows["base"]
        displacement = self.displacement(batch.observations, base_actions)
        condition = self.view("flow", batch.observations).detach()
        row_penalty, seen = self.penalty(condition, displacement, draws, flows, log)
        penalty = row_penalty.mean()
        policy_actions = (base_actions + displacement).clamp(-1, 1)
        q_loss, q_seen = self.q_loss(batch.observations, policy_actions)

        if self.config.lagrange:
            alpha = self.log_alpha.detach().exp()
            multiplier_loss = -self.log_alpha * (penalty.detach() - self.config.target_divergence)
            loss = alpha * penalty + q_loss + multiplier_loss
            seen.update(alpha=alpha, multiplier_loss=multiplier_loss)
        else:
            loss = self.config.alpha * penalty + q_loss
        return loss, {
            **seen,
            **q_seen,
            "base_actions": base_actions,
            "displacement": displacement,
            "policy_actions": policy_actions,
            "row_penalty": row_penalty,
            "penalty": penalty,
            "actor_loss": loss,
        }

    @torch.no_grad()
    def metrics(self, batch: Batch, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        figures = super().metrics(batch, seen)
        if "displacement" in seen:
            figures["displacement_norm"] = seen["displacement"].norm(dim=-1).mean()
            figures["displacement_mean_square"] = seen["displacement"].square().mean()
        return figures
