"""Records that hold the checked options of the public functions, and that make up the schemas of the operators.

A record is built at the public boundary, is passed on whole, and is flattened in one place: where a registered operator
is called (``ops/register.py``). The record of a solver is in ``solvers.py``, those of a network in ``layers.py``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fdkernels.dtypes import accumulate_dtype
from fdkernels.layers import EncodedNetwork
from fdkernels.paths import PATHS, AffinePath, PathName, Time, check_noise_left, levels, resolve_path, takes_numbers
from fdkernels.solvers import Solver
from fdkernels.validation import brief, check_at_least, check_broadcast, check_choice, check_floating, is_number

Convention = Literal["exact", "velocity"]
Normalize = Literal["trace", "none"]
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")


class PenaltyRule(NamedTuple):
    """The damping λ of F = (1/K) Σ_k s_k s_kᵀ + λI, whether F̂ = F / max(tr F / d, ε) replaces F, and ε."""

    damping: float
    normalize: bool
    eps: float


def check_penalty_rule(op: str, damping: float, normalize: Normalize, eps: float) -> PenaltyRule:
    damping = check_at_least(op, "damping", damping, 0.0)
    eps = check_at_least(op, "eps", eps, 0.0, exclusive=True)
    check_choice(op, "normalize", normalize, ("trace", "none"))
    return PenaltyRule(damping, normalize == "trace", eps)


def reduce(penalty: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return penalty
    return penalty.mean() if reduction == "mean" else penalty.sum()


class Affine(NamedTuple):
    """p and q of score = p·v + q·x: two numbers, or instead a tensor (..., 2) of pairs."""

    pairs: Tensor | None
    p: float
    q: float
    use_x: bool
    """Whether the score depends on x; if not, q is unused."""

    def of_rows(self, rows: tuple[int, ...]) -> tuple[Tensor | None, str]:
        """The pairs as a kernel reads them, and their layout: "scalar" (no pairs), "one" for all rows, or by "rows"."""
        if self.pairs is None:
            return None, "scalar"
        if self.pairs.numel() == 2:
            return self.pairs.contiguous(), "one"
        return self.pairs.expand(*rows, 2).contiguous(), "rows"


class ScoreRule(NamedTuple):
    """How a velocity becomes a score, except for the time."""

    op: str
    """The name of the public function, for messages."""
    path: AffinePath
    exact: bool
    """False: v / σ_t, as in the published implementation."""
    min_sigma: float
    of_numbers: bool
    """Whether the path also takes a Python float and returns one."""

    def affine(self, t: Tensor | float, velocity: Tensor, x: Tensor) -> Affine:
        """p and q at time t. A number stays one on a built-in path, and costs the device nothing."""
        if self.of_numbers and not isinstance(t, Tensor):
            return Affine(None, *self._coefficients(t), self.exact)
        dtype, ndim = accumulate_dtype(velocity, x), velocity.ndim
        if isinstance(t, Tensor):
            t = t.to(dtype)
            t = torch.where((t >= 0) & (t <= 1), t, torch.nan)
            t = t.reshape((1,) * (ndim - t.ndim) + t.shape)
        else:
            t = torch.full((1,) * ndim, t, dtype=dtype, device=x.device)
        return Affine(torch.cat(self._coefficients(t), -1), 1.0, 0.0, self.exact)

    def levels(self, t: Tensor | float, device: torch.device) -> tuple[Any, Any]:
        """α and σ at a number, as :func:`fdkernels.paths.levels`, or at a tensor of times, in its dtype."""
        if not isinstance(t, Tensor):
            return levels(self.op, self.path, t, device)
        alpha, sigma, _, _ = self.path.at(self.op, t.to(accumulate_dtype(t)))
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def _coefficients(self, t: Time) -> tuple[Time, Time]:
        alpha, sigma, d_alpha, d_sigma = self.path.at(self.op, t)
        bounded: Any = sigma.clamp(min=self.min_sigma) if isinstance(sigma, Tensor) else max(sigma, self.min_sigma)
        if not self.exact:
            return 1 / bounded, 0 * bounded
        denominator = bounded * (d_alpha * sigma - alpha * d_sigma)
        return alpha / denominator, -d_alpha / denominator


def check_score_rule(op: str, path: PathName | AffinePath, convention: Convention, min_sigma: float) -> ScoreRule:
    check_choice(op, "convention", convention, ("exact", "velocity"))
    min_sigma = check_at_least(op, "min_sigma", min_sigma, 0.0)
    resolved = resolve_path(op, path)
    if convention == "velocity" and resolved is not PATHS["linear"]:
        raise ValueError(
            f"{op}: convention='velocity' is v / (1 − t), defined for path='linear' only, got {brief(path)}"
        )
    return ScoreRule(op, resolved, convention == "exact", min_sigma, isinstance(path, str) or takes_numbers(resolved))


def check_time(
    t: Tensor | float, rule: ScoreRule, like: Tensor, rows: tuple[int, ...], event_dim: int
) -> Tensor | float:
    """The time for rows of this leading shape, whose tensors have one more dimension.

    A tensor must broadcast to their shape before they were flattened, with 1 for each dimension of the event. A number
    must be in [0, 1] and leave some noise (σ_t > 0), and becomes a float.
    """
    op, path = rule.op, rule.path
    if isinstance(t, Tensor):
        check_floating(op, like.device, t=t)
        ones = (1,) * event_dim
        check_broadcast(op, "t", t, (*rows, *ones), f"(..., {', '.join(map(str, ones))})")
        return t if event_dim == 1 else t.reshape(t.shape[: 1 - event_dim] if t.ndim >= event_dim else 1)
    if not is_number(t):
        raise TypeError(f"{op}: t must be a number or a torch.Tensor, got {type(t).__name__}")
    if not 0 <= t <= 1:
        raise ValueError(f"{op}: t must lie in [0, 1], got {brief(t)}")
    t = float(t)
    check_noise_left(op, path, t, "score")
    return t


class Way(NamedTuple):
    """How the kernels integrate, as decided in ``backend.py``."""

    precision: str
    """"highest", "high", "bf16" or "fp16"."""
    implementation: str | None
    """The one that the caller insists on."""


class Noise(NamedTuple):
    """Where the K samples of every state come from. Rows are (models, states·K, d)."""

    start: Tensor | None
    """The noise from which the flow is integrated or, if the solver has no times, the ends of the flow."""
    bridge: Tensor | None
    """The noise that brings the samples back to time t."""
    seed: Tensor | None
    """``start`` and ``bridge`` are drawn from it if they are None."""
    num_samples: int


class TimedAffine(NamedTuple):
    """Time t, α and σ there, p and q of every sample: numbers, or instead a tensor (models, states·K, 5)."""

    columns: Tensor | None
    t: float
    alpha: float | None
    sigma: float | None
    """None: with numbers, α = t and σ = 1 − t, as on the linear path."""
    p: float
    q: float
    use_x: bool
    """Whether the score depends on x; if not, q is unused."""


class Chain(NamedTuple):
    """The arguments of the operator flow_fisher_penalty; rows have shape (models, ...)."""

    noise: Noise
    cond: Tensor | None
    displacement: Tensor
    at: TimedAffine
    network: EncodedNetwork
    solver: Solver
    rule: PenaltyRule
    want_score: bool
    way: Way
