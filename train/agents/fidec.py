"""Fisher decorator (arXiv 2604.17919): δ climbs Q inside the trust region δᵀF̂δ/d ≤ target."""

from __future__ import annotations

import torch
from torch import Tensor

import fdkernels
from train.agents.base import Draws, Panel, Parts
from train.agents.decorator import DecoratorAgent
from train.agents.hyperparameters import AgentConfig
from train.data.transitions import Batch


class FiDec(DecoratorAgent):
    """Fisher decorator: the size of δ is δᵀF̂δ/d, where F̂ is the normalised Fisher matrix of the behaviour density."""

    title = "FiDec"
    summary = "Fisher trust region"
    panels = (
        *DecoratorAgent.panels[:2],
        Panel("anisotropy of F", {"top_eigenvalue_share": "top eigenvalue share"}),
    )
    q_scale_floor = 1e-6

    @classmethod
    def flow_evaluations(cls, config: AgentConfig) -> int:
        # each Fisher sample is integrated, and evaluated once more for its score
        return super().flow_evaluations(config) + (config.flow_steps + 1) * config.num_fisher_samples

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        k, high = self.config.num_fisher_samples, min(0.999, self.config.fisher_t)
        low = max(0.001, self.config.fisher_t - self.config.fisher_t_width)
        draws = (
            super()
            .draw(batch_size, generator)
            ._replace(
                fisher_noise=self._normal(generator, batch_size, k), bridge_noise=self._normal(generator, batch_size, k)
            )
        )
        if self.config.fisher_t_width == 0:
            return draws
        uniform = torch.rand(batch_size, k, 1, generator=generator, **self._like())
        return draws._replace(fisher_t=low + (high - low) * uniform)

    def starts(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """Adds ``fisher``, K samples for each state."""
        starts = super().starts(batch, draws, parts)
        if "actor" in parts:
            assert draws.fisher_noise is not None
            starts["fisher"] = draws.fisher_noise, batch.observations.unsqueeze(1)
        return starts

    def penalty(
        self, obs: Tensor, displacement: Tensor, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        found = fdkernels.flow_fisher_penalty(
            self.flow,
            obs,
            displacement,
            t=config.fisher_t if draws.fisher_t is None else draws.fisher_t,
            damping=config.fisher_damping,
            eps=config.fisher_trace_eps,
            convention=config.score_convention,
            min_sigma=config.min_sigma,
            samples=flows["fisher"],
            bridge_noise=draws.bridge_noise,
            return_score=log,
        )
        if isinstance(found, Tensor):
            return found, {}
        penalty, score = found
        return penalty, {"score": score}

    @torch.no_grad()
    def metrics(self, batch: Batch, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        figures = super().metrics(batch, seen)
        if "score" in seen:
            spectrum = fdkernels.fisher_spectrum(seen["score"], damping=self.config.fisher_damping)
            figures["fisher_trace_per_dim"] = spectrum.mean()
            figures["top_eigenvalue_share"] = (spectrum[..., 0] / spectrum.sum(-1)).mean()
        return figures
