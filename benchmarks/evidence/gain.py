"""How much of the attainable gain a metric finds: Q gained per KL paid, for a linear Q, as a share of the optimum.

For Q(a) = g·a and a displacement δ = M⁻¹g, the gain is g·δ and the KL divergence ½δᵀΣ⁻¹δ. The best δ is Σg, so that

    share = g·δ / √( δᵀΣ⁻¹δ · gᵀΣg ),

which is 1 for M ∝ Σ⁻¹. ``of_each`` is its mean over states, actions of the flow and directions g. ``of_all`` has the
expectations of the three products in their place, with each M normalised by its trace: what an agent gains whose one
multiplier serves all states. ``of_all_raw`` leaves M its size. For the mixture, Σ is that of the action's own mode: no
metric by state can match it. ½δᵀΣ⁻¹δ is the divergence of a constant shift; what a δ that varies with the action
pays more is in ``kl.py``, as is the ring, which has no Σ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fdkernels
from benchmarks.evidence.densities import DENSITIES, Gaussian, Mixture, observe
from benchmarks.evidence.flows import flow_of
from benchmarks.evidence.metrics import METRICS, STEPS, Metric, unit_trace

STATES, DIRECTIONS = 64, 32


class Question:
    """States, the noise of their actions, and directions g: the same for all metrics."""

    def __init__(self, name: str, seed: int) -> None:
        self.density = DENSITIES[name]
        self.generator = torch.Generator().manual_seed(10_000 + seed)
        self.angle = 2 * math.pi * torch.rand(STATES, generator=self.generator)
        self.obs = observe(self.angle)
        self.noise = torch.randn(STATES, self.density.d, generator=self.generator)
        self.g = torch.randn(STATES, self.density.d, DIRECTIONS, generator=self.generator, dtype=torch.float64)

    def covariance(self, velocity: Any) -> Tensor:
        """Σ at each state, or that of the mode of each action."""
        density, angle = self.density, self.angle.double()
        if isinstance(density, Mixture):
            action = fdkernels.integrate_flow(velocity, self.noise, self.obs, num_steps=STEPS, clip=None)
            return density.covariance_of_mode(angle, action.double())
        assert isinstance(density, Gaussian)
        return density.covariance(angle)

    def shares(self, metric: Metric, velocity: Any) -> dict[str, float]:
        torch.manual_seed(0)
        return self.shares_of(metric.matrix(velocity, self.obs, self.noise), self.covariance(velocity))

    def shares_of(self, matrix: Tensor, covariance: Tensor) -> dict[str, float]:
        best = (self.g * (covariance @ self.g)).sum(1)
        found = {}
        for name, metric in (("of_all", unit_trace(matrix)), ("of_all_raw", matrix)):
            delta = torch.linalg.solve(metric, self.g)
            gained = (self.g * delta).sum(1)
            paid = (delta * torch.linalg.solve(covariance, delta)).sum(1)
            found[name] = (gained.mean() / (paid.mean() * best.mean()).sqrt()).item()
        return {"of_each": (gained / (paid * best).sqrt()).mean().item(), **found}


NAMES = ("gaussian-2", "gaussian-6", "finer", "scaled", "mixture")


def answer(name: str, updates: int, seed: int, data: Path) -> dict[str, Any]:
    """The shares of all metrics under one flow, and of the Fisher matrix under the exact velocity."""
    flow, question = flow_of(name, updates, seed, data), Question(name, seed)
    shares = {label: question.shares(metric, flow) for label, metric in METRICS.items()}
    if isinstance(question.density, Gaussian):
        shares["exact"] = question.shares(METRICS["score"], question.density.velocity)
    return {"density": name, "updates": updates, "seed": seed, "shares": shares}


def tasks(data: Path, seed: int, updates: tuple[int, ...], quick: bool) -> Iterator[tuple[Path, Any, tuple[Any, ...]]]:
    for n in updates:
        for name in NAMES:
            yield data / "gain" / f"{name}-{n}-seed{seed}.json", answer, (name, n, seed, data)
