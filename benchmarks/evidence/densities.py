"""Behaviours whose density is known: actions given an angle, the state."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor


def observe(angle: Tensor) -> Tensor:
    """The observation of a state, (n, 2)."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotation(angle: Tensor) -> Tensor:
    """(n,) -> (n, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


class Density(abc.ABC):
    """p(a | angle); angles (n,), actions (..., n, d)."""

    title: str
    d: int

    @abc.abstractmethod
    def sample(self, angle: Tensor) -> Tensor:
        """One action for each angle, (n, d)."""

    @abc.abstractmethod
    def log_prob(self, angle: Tensor, action: Tensor) -> Tensor:
        """(..., n)."""


class Gaussian(Density):
    """Pairs of coordinates, each a thin Gaussian that turns with the state.

    Args:
        widths: standard deviations of each pair, along and across.
        turns: how fast each pair turns with the state.
        scale: of all standard deviations, by state.
    """

    def __init__(
        self,
        title: str,
        widths: tuple[tuple[float, float], ...],
        turns: tuple[int, ...],
        scale: Callable[[Tensor], Tensor] = torch.ones_like,
        centre: float = 0.6,
    ) -> None:
        self.title, self.widths, self.turns, self.scale, self.centre = title, widths, turns, scale, centre
        self.d = 2 * len(widths)

    def parts(self, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (n, d), axes (n, d, d) and standard deviations (n, d)."""
        n = len(angle)
        mean, axes = angle.new_zeros(n, self.d), angle.new_zeros(n, self.d, self.d)
        for i, turn in enumerate(self.turns):
            phase, pair = turn * angle + 0.7 * i, slice(2 * i, 2 * i + 2)
            axes[:, pair, pair] = rotation(phase + math.pi / 2)
            mean[:, pair] = self.centre * observe(phase + math.pi / 4)  # along no axis
        deviations = torch.tensor(self.widths, dtype=angle.dtype).flatten() * self.scale(angle).unsqueeze(-1)
        return mean, axes, deviations

    def sample(self, angle: Tensor) -> Tensor:
        mean, axes, deviations = self.parts(angle)
        return mean + (axes @ (deviations * torch.randn_like(mean)).unsqueeze(-1)).squeeze(-1)

    def covariance(self, angle: Tensor) -> Tensor:
        """Σ, (n, d, d)."""
        _, axes, deviations = self.parts(angle)
        return (axes * deviations.square().unsqueeze(-2)) @ axes.mT

    def log_prob(self, angle: Tensor, action: Tensor) -> Tensor:
        mean, axes, deviations = self.parts(angle)
        y = (axes.mT @ (action - mean).unsqueeze(-1)).squeeze(-1) / deviations
        return -0.5 * (y.square() + (2 * math.pi * deviations.square()).log()).sum(-1)

    def velocity(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """The exact velocity of the linear path, for x (..., d), t (..., 1) and observations (..., 2)."""
        angle = torch.atan2(obs[..., 1], obs[..., 0]).flatten()
        mean, axes, deviations = (part.reshape(*x.shape[:-1], *part.shape[1:]) for part in self.parts(angle))
        variance = deviations.square()
        gain = (t * variance - (1 - t)) / ((1 - t).square() + t.square() * variance)
        y = (axes.mT @ (x - t * mean).unsqueeze(-1)).squeeze(-1)
        return mean + (axes @ (gain * y).unsqueeze(-1)).squeeze(-1)


class Mixture(Density):
    """Unequal modes: weight, Gaussian."""

    def __init__(self, title: str, modes: tuple[tuple[float, Gaussian], ...]) -> None:
        self.title, self.modes, self.d = title, modes, modes[0][1].d

    def joint(self, angle: Tensor, action: Tensor) -> Tensor:
        """log(w_m·p_m(a)), (..., n, modes)."""
        return torch.stack([math.log(w) + mode.log_prob(angle, action) for w, mode in self.modes], -1)

    def log_prob(self, angle: Tensor, action: Tensor) -> Tensor:
        return self.joint(angle, action).logsumexp(-1)

    def sample(self, angle: Tensor) -> Tensor:
        draws = torch.stack([mode.sample(angle) for _, mode in self.modes])
        weights = torch.tensor([w for w, _ in self.modes])
        return draws[torch.multinomial(weights, len(angle), replacement=True), torch.arange(len(angle))]

    def covariance_of_mode(self, angle: Tensor, action: Tensor) -> Tensor:
        """Σ of the mode that each action (n, d) belongs to, (n, d, d)."""
        own = self.joint(angle, action).argmax(-1)
        return torch.stack([mode.covariance(angle) for _, mode in self.modes])[own, torch.arange(len(angle))]


class Ring(Density):
    """A circle, 0.04 wide, whose centre moves with the state."""

    title = "ring"
    d = 2
    radius, width, offset = 0.5, 0.04, 0.15

    def sample(self, angle: Tensor) -> Tensor:
        n = len(angle)
        around = observe(2 * math.pi * torch.rand(n, dtype=angle.dtype))
        radius = self.radius + self.width * torch.randn(n, 1, dtype=angle.dtype)
        return self.offset * observe(angle) + radius * around

    def log_prob(self, angle: Tensor, action: Tensor) -> Tensor:
        radius = (action - self.offset * observe(angle)).norm(dim=-1)
        normal = -0.5 * ((radius - self.radius) / self.width).square() - math.log(self.width * math.sqrt(2 * math.pi))
        return normal - (2 * math.pi * radius).log()


class Moons(Density):
    """Two half circles that face each other, 0.05 wide, the same in every state: many round Gaussians along arcs."""

    title = "two moons"
    d = 2
    width = 0.05

    def __init__(self, points: int = 128) -> None:
        around = observe(math.pi * torch.linspace(0, 1, points // 2, dtype=torch.float64))
        shift = torch.tensor([0.22, 0.12], dtype=torch.float64)
        self.centres = torch.cat([0.45 * around - shift, -0.45 * around + shift])

    def sample(self, angle: Tensor) -> Tensor:
        centres = self.centres.to(angle)[torch.randint(len(self.centres), (len(angle),))]
        return centres + self.width * torch.randn_like(centres)

    def log_prob(self, angle: Tensor, action: Tensor) -> Tensor:
        squares = (action.unsqueeze(-2) - self.centres.to(angle)).square().sum(-1) / self.width**2
        constant = math.log(2 * math.pi * self.width**2 * len(self.centres))
        return (-0.5 * squares).logsumexp(-1) - constant


def _mode(along: float, across: float, offset: float, turn: float) -> Gaussian:
    return _Turned("mode", ((along, across),), (1,), centre=offset, turn=turn)


class _Turned(Gaussian):
    """A Gaussian whose axes are turned further by a fixed angle."""

    def __init__(self, *args: object, turn: float, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.turn = turn

    def parts(self, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, axes, deviations = super().parts(angle)
        return mean, axes @ rotation(torch.full_like(angle, self.turn)), deviations


DENSITIES: dict[str, Density] = {
    "gaussian-2": Gaussian("Gaussian, d = 2", ((0.25, 0.03),), (1,)),
    "gaussian-6": Gaussian("Gaussian, d = 6", ((0.25, 0.03), (0.2, 0.05), (0.3, 0.1)), (1, -1, 2), centre=0.3),
    # a third as wide; no setting was chosen on it
    "finer": Gaussian("Gaussian, a third as wide", ((0.083, 0.01),), (1,)),
    "scaled": Gaussian("Gaussian, wider in some states", ((0.2, 0.05),), (1,), lambda angle: 2 ** angle.sin()),
    "mixture": Mixture("two unequal modes", ((0.7, _mode(0.2, 0.03, 0.5, 0.0)), (0.3, _mode(0.15, 0.04, -0.5, 1.5)))),
    "ring": Ring(),
    "moons": Moons(),
}
