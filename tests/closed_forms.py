"""Flows known in closed form: the data are a Gaussian or a mixture of Gaussians, on any affine path.

With a ~ N(μ, Σ), x0 ~ N(0, I) and x_t = α_t·a + σ_t·x0, everything is Gaussian: p_t = N(α_t·μ, Σ_t) with
Σ_t = σ_t²·I + α_t²·Σ. In the basis of Σ's eigenvectors (eigenvalues λ) the coordinates are independent. These forms
judge the libraries, so nothing here comes from them.

Times are floats or tensors that broadcast against x as (..., 1); x is (..., d). The dtype is `mean`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from einops import einsum
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Schedule:
    """α_t, σ_t and their time derivatives."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    data_time: float = 1.0  # where α = 1; the noise is at 1 − data_time


def _vp_square(t: Tensor) -> Tensor:
    """α² of the variance-preserving path: exp(−∫₀^{1−t} β), where β rises from 0.1 to 20."""
    s = 1 - t
    return torch.exp(-(0.1 * s + (20 - 0.1) * s**2 / 2))


def _vp_rate(t: Tensor) -> Tensor:
    """d(α²)/dt = β·α²."""
    return (0.1 + (20 - 0.1) * (1 - t)) * _vp_square(t)


SCHEDULES = {
    "linear": Schedule(lambda t: t, lambda t: 1 - t, lambda t: 1 + 0 * t, lambda t: -1 + 0 * t),
    "linear_reversed": Schedule(lambda t: 1 - t, lambda t: t, lambda t: -1 + 0 * t, lambda t: 1 + 0 * t, data_time=0.0),
    "cosine": Schedule(
        lambda t: torch.sin(t * math.pi / 2),
        lambda t: torch.cos(t * math.pi / 2),
        lambda t: torch.cos(t * math.pi / 2) * math.pi / 2,
        lambda t: -torch.sin(t * math.pi / 2) * math.pi / 2,
    ),
    "vp": Schedule(
        lambda t: _vp_square(t) ** 0.5,
        lambda t: (1 - _vp_square(t)) ** 0.5,
        lambda t: _vp_rate(t) / (2 * _vp_square(t) ** 0.5),
        lambda t: -_vp_rate(t) / (2 * (1 - _vp_square(t)) ** 0.5),
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """a ~ N(mean (d,), covariance (d, d))."""

    mean: Tensor
    covariance: Tensor
    path: str = "linear"

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.covariance)

    def _time(self, t: Tensor | float) -> Tensor:
        return torch.as_tensor(t, dtype=self.mean.dtype, device=self.mean.device)

    def _parts(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """α_t·μ, the coordinates y of x − α_t·μ along the eigenvectors, and the eigenvalues s of Σ_t, each (..., d)."""
        t, schedule, (values, vectors) = self._time(t), SCHEDULES[self.path], self._eigen
        centre = schedule.alpha(t) * self.mean
        return centre, (x - centre) @ vectors, schedule.sigma(t) ** 2 + schedule.alpha(t) ** 2 * values

    def velocity(self, x: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """v = E[α̇·a + σ̇·x0 | x_t = x] = α̇·μ + (α̇·α·Σ + σ̇·σ·I)·Σ_t⁻¹·(x − α·μ); `cond` is ignored."""
        t, schedule, (values, vectors) = self._time(t), SCHEDULES[self.path], self._eigen
        d_alpha, d_sigma = schedule.d_alpha(t), schedule.d_sigma(t)
        _, y, s = self._parts(x, t)
        gain = (d_alpha * schedule.alpha(t) * values + d_sigma * schedule.sigma(t)) / s
        return d_alpha * self.mean + (gain * y) @ vectors.mT

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t(x) = −Σ_t⁻¹·(x − α·μ)."""
        _, y, s = self._parts(x, t)
        return -(y / s) @ self._eigen[1].mT

    def log_prob_t(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p_t(x), (...)."""
        _, y, s = self._parts(x, t)
        return -0.5 * (y**2 / s + torch.log(2 * math.pi * s)).sum(-1)

    def covariance_t(self, t: Tensor | float) -> Tensor:
        """Σ_t, (..., d, d)."""
        t, schedule = self._time(t)[..., None], SCHEDULES[self.path]
        identity = torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return schedule.sigma(t) ** 2 * identity + schedule.alpha(t) ** 2 * self.covariance

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of a, (n, d)."""
        values, vectors = self._eigen
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (noise * values.sqrt()) @ vectors.mT

    def transport(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the flow x' = v(x, t) carries x between two times: y(t) ∝ √s(t) along the eigenvectors."""
        _, y, s_start = self._parts(x, start)
        centre, _, s_end = self._parts(x, end)
        return centre + (y * (s_end / s_start).sqrt()) @ self._eigen[1].mT


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """a ~ Σ_m weights[m]·modes[m]; given x, mode m has responsibility r_m(x, t) = w_m·p_m(x) / Σ w·p(x)."""

    weights: tuple[float, ...]
    modes: tuple[Gaussian, ...]

    def _joint(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log(w_m·p_m(x)), (..., M)."""
        terms = [math.log(w) + mode.log_prob_t(x, t) for w, mode in zip(self.weights, self.modes)]
        return torch.stack(terms, dim=-1)

    def responsibilities(self, x: Tensor, t: Tensor | float) -> Tensor:
        """r_m(x, t), (..., M)."""
        return self._joint(x, t).softmax(-1)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """v = Σ_m r_m·v_m; `cond` is ignored."""
        fields = torch.stack([mode.velocity(x, t) for mode in self.modes], dim=-1)
        return einsum(self.responsibilities(x, t), fields, "... m, ... i m -> ... i")

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t(x) = Σ_m r_m·∇ log p_m(x)."""
        scores = torch.stack([mode.score(x, t) for mode in self.modes], dim=-1)
        return einsum(self.responsibilities(x, t), scores, "... m, ... i m -> ... i")

    def log_prob_t(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p_t(x), (...)."""
        return self._joint(x, t).logsumexp(-1)

    @property
    def mean(self) -> Tensor:
        """E[a], (d,)."""
        return sum(w * mode.mean for w, mode in zip(self.weights, self.modes))

    def covariance_t(self, t: Tensor | float) -> Tensor:
        """Cov[x_t], (..., d, d): the modes' covariances plus the spread of their centres."""
        alpha = SCHEDULES[self.modes[0].path].alpha(self.modes[0]._time(t))[..., None]
        shifts = [mode.mean - self.mean for mode in self.modes]
        return sum(
            w * (mode.covariance_t(t) + alpha**2 * torch.outer(shift, shift))
            for w, mode, shift in zip(self.weights, self.modes, shifts)
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of a, (n, d)."""
        draws = torch.stack([mode.sample(n, generator) for mode in self.modes])
        weights = torch.tensor(self.weights, device=draws.device)
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        return draws[which, torch.arange(n, device=draws.device)]


def anisotropic_gaussian(
    d: int,
    *,
    path: str = "linear",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Gaussian:
    """A Gaussian with full covariance: standard deviations 0.2 to 0.6 along random axes, means within ±0.5."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.linspace(0.2, 0.6, d, dtype=torch.float64)
    mean = torch.rand(d, generator=generator, dtype=torch.float64) - 0.5
    return Gaussian(mean.to(device, dtype), ((axes * scales**2) @ axes.mT).to(device, dtype), path)


def two_modes(
    d: int,
    *,
    path: str = "linear",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Mixture:
    """Two Gaussians of different shapes, with weights 0.3 and 0.7 and means 1.6 apart."""
    first, second = (anisotropic_gaussian(d, path=path, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))
    offset = 0.8 / math.sqrt(d)
    return Mixture(
        (0.3, 0.7),
        (
            Gaussian(torch.full_like(first.mean, -offset), first.covariance, path),
            Gaussian(torch.full_like(first.mean, offset), second.covariance, path),
        ),
    )
