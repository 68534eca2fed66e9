"""Fisher decorator (arXiv 2604.17919): δ climbs Q inside the trust region δᵀF̂δ/d ≤ target, or that of other metrics."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import torch
from torch import Tensor

import fdkernels
from train import processes
from train.agents.base import Draws, Panel, Parts
from train.agents.decorator import DecoratorAgent
from train.agents.hyperparameters import AgentConfig, require
from train.data.transitions import Batch

MetricName = Literal["score", "cross", "pullback", "isotropic"]


@dataclasses.dataclass(frozen=True)
class FiDecConfig(AgentConfig):
    metric: MetricName = "score"
    """How the size of δ is measured. score: δᵀF̂δ/d with F from the flow's scores, as published. pullback: δᵀM̂δ/d with M
    the inverse covariance of the behaviour around the action that δ is added to, by the flow's Jacobians; K is the
    number of noisy views of that action. isotropic: ‖δ‖²/d. cross, an experiment: as score, with one score of each pair
    replaced by the noise that it estimates; it may be negative."""
    pullback_t: float = 0.8
    """Time of the views."""
    pullback_steps: int = 2
    """Steps of the flow from there."""
    pullback_damping: float = 3e-4
    """λ, the least variance of the behaviour that counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = typing.get_args(MetricName)
        require("metric", self.metric, self.metric in names, f"one of {', '.join(names)}")
        require("pullback_t", self.pullback_t, 0 <= self.pullback_t < 1, "at least 0 and below 1")
        require("pullback_steps", self.pullback_steps, self.pullback_steps > 0, "positive")
        require("pullback_damping", self.pullback_damping, self.pullback_damping >= 0, "zero or more")


class FiDec(DecoratorAgent):
    """Fisher decorator: the size of δ is δᵀF̂δ/d, where F̂ is the normalised Fisher matrix of the behaviour density.

    Other metrics may replace the Fisher matrix.
    """

    hyperparameters = FiDecConfig
    config: FiDecConfig

    title = "FiDec"
    summary = "Fisher trust region"
    panels = (
        *DecoratorAgent.panels[:2],
        Panel("anisotropy of the metric", {"top_eigenvalue_share": "top eigenvalue share"}),
    )
    q_scale_floor = 1e-6

    @classmethod
    def flow_evaluations(cls, config: AgentConfig, action_dim: int) -> int:
        assert isinstance(config, FiDecConfig)
        base, k = super().flow_evaluations(config, action_dim), config.num_fisher_samples
        if config.metric == "isotropic":
            return base
        if config.metric == "pullback":  # the tangents of a view count like rows
            return base + config.pullback_steps * k * (1 + action_dim)
        # each Fisher sample is integrated, and evaluated once more for its score
        return base + (config.flow_steps + 1) * k

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        draws = super().draw(batch_size, generator)
        config, k = self.config, self.config.num_fisher_samples
        if config.metric == "isotropic":
            return draws
        if config.metric == "pullback":
            return draws._replace(bridge_noise=self._normal(generator, batch_size, k))
        low, high = max(0.001, config.fisher_t - config.fisher_t_width), min(0.999, config.fisher_t)
        draws = draws._replace(
            fisher_noise=self._normal(generator, batch_size, k), bridge_noise=self._normal(generator, batch_size, k)
        )
        if config.fisher_t_width == 0:
            return draws
        uniform = torch.rand(batch_size, k, 1, generator=generator, **self._like())
        return draws._replace(fisher_t=low + (high - low) * uniform)

    def starts(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """Adds ``fisher``, K samples for each state."""
        starts = super().starts(batch, draws, parts)
        if draws.fisher_noise is not None and "actor" in parts:
            starts["fisher"] = draws.fisher_noise, batch.observations.unsqueeze(1)
        return starts

    def penalty(
        self, obs: Tensor, displacement: Tensor, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        if config.metric == "isotropic":
            return displacement.square().mean(-1), {}
        if config.metric == "pullback":
            penalty, jacobian = fdkernels.flow_pullback_penalty(
                self.flow,
                obs,
                flows["base"],
                displacement,
                t=config.pullback_t,
                num_steps=config.pullback_steps,
                damping=config.pullback_damping,
                bridge_noise=draws.bridge_noise,
                precision=config.flow_precision,
                return_jacobian=True,
            )
            return penalty, {"jacobian": jacobian} if log else {}
        t = config.fisher_t if draws.fisher_t is None else draws.fisher_t
        cross = config.metric == "cross"
        found = fdkernels.flow_fisher_penalty(
            self.flow,
            obs,
            displacement,
            t=t,
            damping=config.fisher_damping,
            eps=config.fisher_trace_eps,
            convention=config.score_convention,
            min_sigma=config.min_sigma,
            samples=flows["fisher"],
            bridge_noise=draws.bridge_noise,
            return_score=log or cross,
        )
        if isinstance(found, Tensor):
            return found, {}
        penalty, score = found
        if cross:
            assert draws.bridge_noise is not None
            penalty = cross_penalty(displacement, score, -draws.bridge_noise / (1 - t), config)
        return penalty, {"score": score} if log else {}

    @torch.no_grad()
    def metrics(self, batch: Batch, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        figures = super().metrics(batch, seen)
        if "score" in seen:
            spectrum = fdkernels.fisher_spectrum(seen["score"], damping=self.config.fisher_damping)
        elif "jacobian" in seen:
            spectrum = pullback_spectrum(seen["jacobian"], self.config.pullback_damping)
        else:
            return figures
        figures["fisher_trace_per_dim"] = spectrum.mean()
        figures["top_eigenvalue_share"] = (spectrum[..., 0] / spectrum.sum(-1)).mean()
        return figures


def pullback_spectrum(jacobian: Tensor, damping: float) -> Tensor:
    """Eigenvalues of M, descending, (B, d), from J (B, K, d, d); NaN where J is not finite."""
    finite = jacobian.isfinite().flatten(1).all(1)
    jacobian = torch.where(finite[:, None, None, None], jacobian, 0).double()
    identity = torch.eye(jacobian.shape[-1], dtype=torch.float64, device=jacobian.device)
    metric = torch.linalg.inv_ex(jacobian @ jacobian.mT + max(damping, 1e-12) * identity).inverse.mean(1)
    return torch.where(finite[:, None], torch.linalg.eigvalsh(metric).flip(-1), torch.nan)


def cross_penalty(displacement: Tensor, score: Tensor, noise_score: Tensor, config: FiDecConfig) -> Tensor:
    """δᵀĈδ/d with C = (1/K)·Σ_k sym(s_k·b_kᵀ) + λI, (B,).

    b_k = −x0_k/(1 − t) is the score of x_k given its action, and E[b_k | x_k] the true score, so that E[s_k·b_kᵀ] has
    no square of the error of s_k. C is not positive definite for small K. The trace that normalises it is therefore
    that of the whole batch, λd at least.

    Args:
        displacement: (B, d).
        score, noise_score: s and b, (B, K, d).
    """
    delta, d = displacement.unsqueeze(-1), displacement.shape[-1]
    products = (score @ delta) * (noise_score.to(score.dtype) @ delta)
    size = products.squeeze(-1).mean(-1) + config.fisher_damping * displacement.square().sum(-1)
    trace_per_dim = processes.batch_mean((score * noise_score).sum(-1)) / d + config.fisher_damping
    return size / d / trace_per_dim.clamp(min=max(config.fisher_damping, config.fisher_trace_eps))
