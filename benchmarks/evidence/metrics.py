"""Ways to estimate the metric of a behaviour from its flow: for each state, a matrix M that weighs a displacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

import fdkernels

STEPS = 10


Matrix: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]


class Metric(NamedTuple):
    matrix: Matrix
    """Maps a velocity, observations (n, c) and the noise of the actions (n, d) to M (n, d, d), float64."""
    title: str = ""
    evaluations: int = 0
    """Rows of the velocity network for a state with d = 6; a tangent counts like a row."""
    local: bool = False
    """Whether M depends on the action, not only on the state."""


def isotropic(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
    n, d = noise.shape
    return torch.eye(d, dtype=torch.float64).expand(n, d, d)


def score(
    samples: int,
    t: float | tuple[float, float],
    *,
    damping: float = 1e-3,
    cross: bool = False,
    convention: Literal["exact", "velocity"] = "exact",
    group: int | None = None,
) -> Matrix:
    """F = (1/K)·Σ_k s_k·s_kᵀ + λI at K fresh samples; ``cross`` replaces one score by −x0_k/(1 − t), symmetrised.

    A pair of times draws the time of each sample between them. With ``group``, the mean of F/tr F over groups of so
    many samples: what an agent feels that draws a group for every update.
    """

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        d, rows = noise.shape[-1], []
        for part in obs.split(max(1, 32_768 // samples)):
            bridge = torch.randn(len(part), samples, d, dtype=noise.dtype)
            low, high = t if isinstance(t, tuple) else (t, t)
            times = low + (high - low) * torch.rand(len(part), samples, 1, dtype=noise.dtype)
            _, s = fdkernels.flow_fisher_penalty(
                velocity, part, torch.zeros(len(part), d, dtype=noise.dtype), num_steps=STEPS, t=times, clip=None,
                convention=convention, noise=torch.randn_like(bridge), bridge_noise=bridge, return_score=True,
            )  # fmt: skip
            other = -bridge / (1 - times) if cross else s
            s, other = (x.double().unflatten(1, (-1, group or samples)) for x in (s, other))
            outer = s.mT @ other / s.shape[2]
            fisher = (outer + outer.mT) / 2 + damping * torch.eye(d, dtype=torch.float64)
            rows.append((unit_trace(fisher) if group else fisher).mean(1))
        return torch.cat(rows)

    return matrix


def sample_covariance(samples: int, damping: float = 1e-3) -> Matrix:
    """The inverse covariance of K samples of the flow, + λI."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        d, rows = noise.shape[-1], []
        for part in obs.split(max(1, 32_768 // samples)):
            start = torch.randn(len(part), samples, d, dtype=noise.dtype)
            a = fdkernels.integrate_flow(velocity, start, part.unsqueeze(1), num_steps=STEPS, clip=None).double()
            a = a - a.mean(1, keepdim=True)
            rows.append(a.mT @ a / (samples - 1))
        return torch.linalg.inv(torch.cat(rows) + damping * torch.eye(d, dtype=torch.float64))

    return matrix


def pullback(
    samples: int = 4, t: float = 0.8, steps: int = 2, damping: float = 3e-4, *, group: int | None = None
) -> Matrix:
    """(1/K)·Σ_k (J_k·J_kᵀ + λI)⁻¹ from K noisy views of the action; ``group`` as for `score`."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        action = fdkernels.integrate_flow(velocity, noise, obs, num_steps=STEPS, clip=None)
        _, j = fdkernels.flow_pullback_penalty(
            velocity, obs, action, torch.zeros_like(action), num_samples=samples, t=t, num_steps=steps,
            return_jacobian=True,
        )  # fmt: skip
        matrices = inverse_covariance(j, damping)
        return unit_trace(matrices.unflatten(1, (-1, group)).mean(2)).mean(1) if group else matrices.mean(1)

    return matrix


def pullback_along(damping: float = 3e-4, *, own: bool = True) -> Matrix:
    """(J·Jᵀ + λI)⁻¹ with J along the whole path from noise, of the action itself or of another one."""

    def matrix(velocity: Any, obs: Tensor, noise: Tensor) -> Tensor:
        start = noise if own else torch.randn_like(noise)
        _, j = fdkernels.flow_jacobian(velocity, start, obs, num_steps=STEPS, clip=None)
        return inverse_covariance(j, damping)

    return matrix


def unit_trace(matrix: Tensor) -> Tensor:
    """M / (tr M / d)."""
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def inverse_covariance(jacobian: Tensor, damping: float) -> Tensor:
    jacobian = jacobian.double()
    identity = torch.eye(jacobian.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(jacobian @ jacobian.mT + damping * identity)


def scores(samples: int) -> int:
    return samples * (STEPS + 1)


def jacobians(samples: int, steps: int, d: int = 6) -> int:
    return samples * steps * (1 + d)


METRICS: dict[str, Metric] = {
    "isotropic": Metric(isotropic, "isotropic, ‖δ‖²"),
    "score-4": Metric(score(4, 0.95), "Fisher, t = 0.95, one draw of K = 4", scores(4)),
    "score-mean": Metric(score(512, 0.95, group=4), "Fisher, t = 0.95, K = 4 averaged (published)", scores(4)),
    "score-mean-0.8": Metric(score(512, 0.8, group=4), "Fisher, t = 0.8, K = 4 averaged", scores(4)),
    "score": Metric(score(512, 0.95), "Fisher, t = 0.95, K = 512", scores(512)),
    "score-0.8": Metric(score(512, 0.8), "Fisher, t = 0.8, K = 512", scores(512)),
    "score-times": Metric(score(512, (0.7, 0.98)), "Fisher, t from 0.7 to 0.98, K = 512", scores(512)),
    "velocity": Metric(score(512, 0.95, convention="velocity"), "v/(1 − t), t = 0.95, K = 512", scores(512)),
    "cross-4": Metric(score(4, 0.95, cross=True), "cross estimate, t = 0.95, one draw of K = 4", scores(4)),
    "cross": Metric(score(512, 0.95, cross=True), "cross estimate, t = 0.95, K = 512", scores(512)),
    "covariance-16": Metric(sample_covariance(16), "inverse covariance of 16 samples", 16 * STEPS),
    "covariance": Metric(sample_covariance(512), "inverse covariance of 512 samples", 512 * STEPS),
    "path-other": Metric(pullback_along(own=False), "pull-back along another sample's path", jacobians(1, STEPS)),
    "path": Metric(pullback_along(), "pull-back along the action's own path", jacobians(1, STEPS), local=True),
    "pullback-1": Metric(pullback(1), "pull-back, one draw of one view", jacobians(1, 2), local=True),
    "pullback": Metric(pullback(4), "pull-back, one draw of 4 views", jacobians(4, 2), local=True),
    "pullback-mean": Metric(pullback(32, group=2), "pull-back, 2 views averaged (ours)", jacobians(2, 2), local=True),
}
""" "Averaged": the mean of trace-normalised metrics over many draws, which is what an agent feels over its updates."""
