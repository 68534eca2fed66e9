"""Records of pointers and numbers that the flow's kernels take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Tensors of each layer, the output layer last. Those of many networks are stacked, (models, ...)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[Tensor | None, ...]
    shifts: tuple[Tensor | None, ...]


class Rows(NamedTuple):
    """The rows to integrate."""

    start: Tensor | None
    """Rows of noise x0, ordered by model, state and sample. If None, the kernel draws them from the seed."""
    seed: Tensor | None
    cond: Tensor | None
    table: Tensor
    """(num_evals, 4) float32, one line for each evaluation of the solve: time, reach and weight (both times the step
    size), and 1 if a step ends. If there are no lines, the rows of ``start`` are finished samples."""


class Bridge(NamedTuple):
    """Noise, times and coefficients that bring samples back to time t, x_t = α·a + σ·x0'."""

    noise: Tensor | None
    """x0'. If None, the kernel draws it from the seed."""
    columns: Tensor | None
    """(t, α, σ, p, q) of each row, or None if numbers serve all rows."""
    t: float
    alpha: float | None
    sigma: float | None
    """None: with numbers, α = t and σ = 1 − t, as on the linear path."""


class Fisher(NamedTuple):
    """How samples become a penalty; see ``penalty_kernel``."""

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
    """See ``streamed`` and ``stationary``. Each group has one counter, zero at launch."""

    share: Tensor
    hidden: Tensor
    wide: Tensor | None
    partial: Tensor | None
    counter: Tensor | None
