"""Records of pointers, and of numbers, that the flow's kernels take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Every layer's, the output layer last; of many networks (models, ...) stacked."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[Tensor | None, ...]
    shifts: tuple[Tensor | None, ...]


class Rows(NamedTuple):
    """What is integrated."""

    start: Tensor | None
    """Rows of noise x0, all of a model's states with their K samples, then the next model's. None draws them in the
    kernel, from the seed."""
    seed: Tensor | None
    cond: Tensor | None
    table: Tensor
    """(num_evals, 4) float32, a line for each evaluation of the solve: time, reach, weight (step size included), and 1
    where a step ends. No lines: the rows of ``start`` are finished samples."""


class Bridge(NamedTuple):
    """What brings samples back to time t."""

    noise: Tensor | None
    """x0'. None draws it in the kernel, from the seed."""
    triples: Tensor | None
    """(t, p, q) of each row, in the place of the numbers."""
    t: float


class Fisher(NamedTuple):
    """What becomes of the samples, see ``penalty_kernel``."""

    bridge: Bridge
    p: float
    q: float
    damping: float
    eps: float
    displacement: Tensor
    penalty: Tensor
    gradient: Tensor
    score: Tensor | None


class Scratch(NamedTuple):
    """See ``streamed`` and ``stationary``. The counters, one a group, are zero."""

    share: Tensor
    hidden: Tensor
    wide: Tensor | None
    partial: Tensor | None
    counter: Tensor | None
