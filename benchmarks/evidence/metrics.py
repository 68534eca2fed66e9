"""Ways to estimate the metric of a behaviour from its flow: for each state, a matrix M that weighs a displacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fdkernels

STEPS = 10


class Metric(NamedTuple):
    title: str
    evaluations: int | None
    """Rows of the velocity network per state for d = 6, the derivatives' among them; None if it is not from a flow."""
    matrix: Callable[[Any, Tensor, Tensor], Tensor]
    """Maps a velocity, observations (n, c) and the noise of the actions (n, d) to M (n, d, d), float64."""
    local: bool = False
    """Whether M depends on the action, not only on the state."""


def isotropic(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
    n, d = noise.shape
    return torch.eye(d, dtype=torch.float64).expand(n, d, d)


def score(
    samples: int, t: float, *, damping: float = 1e-3, cross: bool = False, convention: str = "exact"
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """F = (1/K)·Σ_k s_k·s_kᵀ + λI at K fresh samples; ``cross`` replaces one score by −x0_k/(1 − t), symmetrised."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        (n, d), rows = noise.shape, []
        for part in obs.split(max(1, 32_768 // samples)):
            bridge = torch.randn(len(part), samples, d, dtype=noise.dtype)
            _, s = fdkernels.flow_fisher_penalty(
                velocity, part, torch.zeros(len(part), d, dtype=noise.dtype), num_steps=STEPS, t=t, clip=None,
                convention=convention, noise=torch.randn_like(bridge), bridge_noise=bridge, return_score=True,
            )  # fmt: skip
            other = -bridge / (1 - t) if cross else s
            outer = s.double().mT @ other.double() / samples
            rows.append((outer + outer.mT) / 2)
        return torch.cat(rows) + damping * torch.eye(d, dtype=torch.float64)

    return matrix


def sample_covariance(samples: int, damping: float = 1e-3) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """The inverse covariance of K samples of the flow, + λI."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        (n, d), rows = noise.shape, []
        for part in obs.split(max(1, 32_768 // samples)):
            start = torch.randn(len(part), samples, d, dtype=noise.dtype)
            a = fdkernels.integrate_flow(velocity, start, part.unsqueeze(1), num_steps=STEPS, clip=None).double()
            a = a - a.mean(1, keepdim=True)
            rows.append(a.mT @ a / (samples - 1))
        return torch.linalg.inv(torch.cat(rows) + damping * torch.eye(d, dtype=torch.float64))

    return matrix


def pullback(
    samples: int = 4, t: float = 0.8, steps: int = 2, damping: float = 1e-3
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """(1/K)·Σ_k (J_k·J_kᵀ + λI)⁻¹ from K noisy views of the action."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        action = fdkernels.integrate_flow(velocity, noise, obs, num_steps=STEPS, clip=None)
        _, j = fdkernels.flow_pullback_penalty(
            velocity, obs, action, torch.zeros_like(action), num_samples=samples, t=t, num_steps=steps,
            return_jacobian=True,
        )  # fmt: skip
        return inverse_covariance(j, damping).mean(1)

    return matrix


def pullback_along(damping: float = 1e-3, *, own: bool = True) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """(J·Jᵀ + λI)⁻¹ with J along the whole path from noise, of the action itself or of another one."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        start = noise if own else torch.randn_like(noise)
        _, j = fdkernels.flow_jacobian(velocity, start, obs, num_steps=STEPS, clip=None)
        return inverse_covariance(j, damping)

    return matrix


def inverse_covariance(jacobian: Tensor, damping: float) -> Tensor:
    jacobian = jacobian.double()
    identity = torch.eye(jacobian.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(jacobian @ jacobian.mT + damping * identity)


def scores(samples: int) -> int:
    return samples * (STEPS + 1)


def jacobians(samples: int, steps: int, d: int = 6) -> int:
    return samples * steps * (1 + d)


METRICS: dict[str, Metric] = {
    "isotropic": Metric("isotropic, ‖δ‖²", 0, isotropic),
    "score-4": Metric("Fisher, t = 0.95, K = 4 (published)", scores(4), score(4, 0.95)),
    "score-4-0.8": Metric("Fisher, t = 0.8, K = 4", scores(4), score(4, 0.8)),
    "score-16": Metric("Fisher, t = 0.95, K = 16", scores(16), score(16, 0.95)),
    "score": Metric("Fisher, t = 0.95, K = 512", scores(512), score(512, 0.95)),
    "score-0.8": Metric("Fisher, t = 0.8, K = 512", scores(512), score(512, 0.8)),
    "velocity": Metric("v/(1 − t), t = 0.95, K = 512", scores(512), score(512, 0.95, convention="velocity")),
    "cross-4": Metric("cross estimate, t = 0.95, K = 4", scores(4), score(4, 0.95, cross=True)),
    "cross": Metric("cross estimate, t = 0.95, K = 512", scores(512), score(512, 0.95, cross=True)),
    "covariance-16": Metric("inverse covariance of 16 samples", 16 * STEPS, sample_covariance(16)),
    "covariance": Metric("inverse covariance of 512 samples", 512 * STEPS, sample_covariance(512)),
    "path-other": Metric("pull-back along another sample's path", jacobians(1, STEPS), pullback_along(own=False)),
    "path": Metric("pull-back along the action's own path", jacobians(1, STEPS), pullback_along(), local=True),
    "pullback-1": Metric("pull-back of 1 view", jacobians(1, 2), pullback(1), local=True),
    "pullback": Metric("pull-back of 4 views (ours)", jacobians(4, 2), pullback(4), local=True),
}
