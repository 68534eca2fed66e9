"""The true KL divergence that a displacement pays, with the density in closed form and no second-order expansion.

The map a → a + c·δ(a), δ = M(a)⁻¹g, carries the density p to p_c, and

    KL(p_c ‖ p) = E[log p(a) − log p(a + c·δ) − log |det(I + c·∂δ/∂a)|]    over actions a of p itself,

in which ∂δ/∂a follows from differences. This holds where the map does not fold; the share of actions at which it does
is kept with the answer. A metric by action is that at the noise which the flow carries to a. One c serves all states
and directions, as one multiplier serves an agent, and is chosen so that the divergence meets a budget. The gain is then
c·E[g·δ].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fdkernels
from benchmarks.evidence.densities import DENSITIES, observe
from benchmarks.evidence.flows import flow_of
from benchmarks.evidence.likelihood import noise_of
from benchmarks.evidence.metrics import METRICS, Metric, unit_trace

STATES, DIRECTIONS = 512, 8
H = 1e-5  # of the differences
BUDGETS = (1e-3, 1e-2, 1e-1, 0.5)
NAMES = ("gaussian-2", "scaled", "mixture", "ring")
ASKED = ("isotropic", "score-mean", "score-mean-0.8", "score", "covariance", "path", "pullback-mean")


class Question:
    """States, actions of the density itself, and directions g: the same for all metrics."""

    def __init__(self, name: str, seed: int, *, angle: float | None = None, g: Tensor | None = None) -> None:
        self.density = DENSITIES[name]
        d, generator = self.density.d, torch.Generator().manual_seed(20_000 + seed)
        self.angle = 2 * math.pi * torch.rand(STATES, generator=generator, dtype=torch.float64)
        if angle is not None:
            self.angle = torch.full_like(self.angle, angle)
        half = torch.randn(STATES, d, DIRECTIONS // 2, generator=generator, dtype=torch.float64)
        if g is not None:
            half = g.reshape(1, d, 1).expand(STATES, d, 1)
        self.g = torch.cat([half, -half], -1)  # in pairs, so that what is linear in g cancels
        torch.manual_seed(seed)
        self.action, self.obs = self.density.sample(self.angle), observe(self.angle)

    def optimum(self) -> float:
        """E[gᵀ·Cov[a | s]·g]. The best policy gains √(2·budget) times its root, by tilting p towards exp(g·a/η)."""
        samples = self.density.sample(self.angle.repeat_interleave(1_000)).unflatten(0, (len(self.angle), -1))
        centred = samples - samples.mean(1, keepdim=True)
        return (centred @ self.g).square().mean().item()


class Bill:
    """The field of one metric under one flow, ready to be paid for at any c."""

    def __init__(self, question: Question, metric: Metric, flow: fdkernels.VelocityMLP) -> None:
        self.question, self.metric, d = question, metric, question.density.d
        self.identity = torch.eye(d, dtype=torch.float64)
        if metric.local:
            exact, action, obs = copy.deepcopy(flow).double(), question.action, question.obs

            def at(moved: Tensor) -> Tensor:
                return self._field(exact, obs, noise_of(exact, obs, moved))

            slopes = [(at(action + H * axis) - at(action - H * axis)) / (2 * H) for axis in self.identity]
            self.delta = at(action)
            self.slope = torch.stack(slopes, -1).movedim(2, 1)  # (n, directions, i, j): ∂δ_i/∂a_j
        else:
            self.delta = self._field(flow, question.obs.float(), torch.randn(STATES, d))
            self.slope = torch.zeros(d, d, dtype=torch.float64)

    def _field(self, flow: fdkernels.VelocityMLP, obs: Tensor, noise: Tensor) -> Tensor:
        """δ for c = 1, (n, d, directions)."""
        torch.manual_seed(0)  # the same draws at every point
        self.matrix = unit_trace(self.metric.matrix(flow, obs, noise))
        return torch.linalg.solve(self.matrix, self.question.g)

    def divergence(self, c: float) -> float:
        """Nats paid on average."""
        q = self.question
        moved = (q.action.unsqueeze(-1) + c * self.delta).movedim(-1, 0)  # (directions, n, d)
        fall = q.density.log_prob(q.angle, q.action) - q.density.log_prob(q.angle, moved)
        _, stretch = torch.linalg.slogdet(self.identity + c * self.slope)
        return (fall.mean() - stretch.mean()).item()

    def folded(self, c: float) -> float:
        """The share of actions and directions at which the map turns the density inside out."""
        sign, _ = torch.linalg.slogdet(self.identity + c * self.slope)
        return (sign <= 0).double().mean().item()

    def scale(self, budget: float) -> float:
        """The c at which the divergence meets the budget."""
        low, high = 0.0, 1e-6
        while self.divergence(high) < budget:
            low, high = high, 2 * high
            if high > 1e6:
                raise ValueError(f"no displacement of {self.question.density.title} pays {budget} nats")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.divergence(middle) < budget else (low, middle)
        return low

    def gain(self, budget: float) -> float:
        """Mean g·δ at that c."""
        return self.scale(budget) * (self.question.g * self.delta).sum(1).mean().item()


def answer(name: str, updates: int, seed: int, data: Path) -> dict[str, Any]:
    """For each metric and budget: the gain, over that of the isotropic metric and over the optimum of any policy."""
    flow, question = flow_of(name, updates, seed, data), Question(name, seed)
    best = question.optimum()
    found: dict[str, Any] = {"density": name, "updates": updates, "seed": seed}
    found |= {"gains": {}, "ratios": {}, "shares": {}, "folded": {}, "order": {}}
    for label in ASKED:
        bill = Bill(question, METRICS[label], flow)
        scales = [bill.scale(budget) for budget in BUDGETS]
        gains = [c * (question.g * bill.delta).sum(1).mean().item() for c in scales]
        found["gains"][label] = gains
        found["ratios"][label] = [gain / base for gain, base in zip(gains, found["gains"]["isotropic"])]
        found["shares"][label] = [gain / (2 * budget * best) ** 0.5 for gain, budget in zip(gains, BUDGETS)]
        found["folded"][label] = [bill.folded(c) for c in scales]
        found["order"][label] = order(scales)
    return found


def order(scales: list[float]) -> float | None:
    """The power of c in the relative error of KL ≈ κ·c², at the two largest budgets; None if it is below a percent."""
    errors = [abs(budget / BUDGETS[0] * (scales[0] / c) ** 2 - 1) for budget, c in zip(BUDGETS, scales)]
    if min(errors[-2:]) < 1e-2:
        return None
    return math.log(errors[-1] / errors[-2]) / math.log(scales[-1] / scales[-2])


def tasks(data: Path, seed: int, updates: tuple[int, ...], quick: bool) -> Iterator[tuple[Path, Any, tuple[Any, ...]]]:
    for n in updates[1:]:
        for name in NAMES:
            yield data / "kl" / f"{name}-{n}-seed{seed}.json", answer, (name, n, seed, data)
