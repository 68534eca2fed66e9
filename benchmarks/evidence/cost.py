"""The true KL divergence that a displacement pays, with the density in closed form and no second-order expansion.

The map a → a + c·δ(a), δ = M(a)⁻¹g, carries the density p to p_c, and

    KL(p_c ‖ p) = E[log p(a) − log p(a + c·δ) − log |det(I + c·∂δ/∂a)|]    over actions a of p itself,

in which ∂δ/∂a follows from differences. A metric by action is that at the noise which the flow carries to a. One c
serves all states and directions, as one multiplier serves an agent, and is chosen so that the divergence meets a
budget. The gain is then c·E[g·δ].
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

import fdkernels
from benchmarks.evidence.densities import DENSITIES, observe
from benchmarks.evidence.likelihood import noise_of
from benchmarks.evidence.metrics import Metric

STATES, DIRECTIONS = 256, 8
H = 1e-5  # of the differences


class Bill:
    """The field of one metric under one flow, ready to be paid for at any c."""

    def __init__(self, name: str, metric: Metric, flow: fdkernels.VelocityMLP, seed: int, *, trace: bool = True) -> None:
        self.density, self.metric, self.trace = DENSITIES[name], metric, trace
        d, generator = self.density.d, torch.Generator().manual_seed(20_000 + seed)
        self.angle = 2 * math.pi * torch.rand(STATES, generator=generator, dtype=torch.float64)
        half = torch.randn(STATES, d, DIRECTIONS // 2, generator=generator, dtype=torch.float64)
        self.g = torch.cat([half, -half], -1)  # in pairs, so that what is linear in g cancels
        torch.manual_seed(seed)
        self.action, obs = self.density.sample(self.angle), observe(self.angle)
        self.identity = torch.eye(d, dtype=torch.float64)
        if metric.local:
            exact = copy.deepcopy(flow).double()
            self.delta = self._field(exact, obs, noise_of(exact, obs, self.action))
            ends = [
                [self._field(exact, obs, noise_of(exact, obs, self.action + sign * H * axis)) for sign in (1, -1)]
                for axis in self.identity
            ]
            # (n, directions, i, j): ∂δ_i/∂a_j
            self.slope = torch.stack([(ahead - behind) / (2 * H) for ahead, behind in ends], -1).movedim(2, 1)
        else:
            self.delta = self._field(flow, obs.float(), torch.randn(STATES, d))
            self.slope = torch.zeros(d, d, dtype=torch.float64)

    def _field(self, flow: fdkernels.VelocityMLP, obs: Tensor, noise: Tensor) -> Tensor:
        """δ for c = 1, (n, d, directions)."""
        matrix = self.metric.matrix(flow, obs, noise)
        if self.trace:
            matrix = matrix / matrix.diagonal(dim1=-2, dim2=-1).mean(-1).reshape(-1, 1, 1)
        return torch.linalg.solve(matrix, self.g)

    def divergence(self, c: float) -> float:
        """Nats paid on average."""
        moved = (self.action.unsqueeze(-1) + c * self.delta).movedim(-1, 0)  # (directions, n, d)
        fall = self.density.log_prob(self.angle, self.action) - self.density.log_prob(self.angle, moved)
        _, stretch = torch.linalg.slogdet(self.identity + c * self.slope)
        return (fall.mean() - stretch.mean()).item()

    def gain(self, budget: float) -> float:
        """Mean g·δ for the largest c up to which the divergence stays within the budget."""
        low, high = 0.0, 1e-6
        while self.divergence(high) < budget and high < 1e6:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.divergence(middle) < budget else (low, middle)
        return low * (self.g * self.delta).sum(1).mean().item()
