"""From the velocity of a flow to the score of its marginal density."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.operators import accumulate_dtype, plain_is_better, score_formula, score_operator
from fdkernels.paths import PATHS, AffinePath, Time, takes_numbers
from fdkernels.validation import check_at_least, check_broadcast, check_choice, check_floating, check_shape

PathName = Literal["linear", "linear_reversed", "vp", "cosine"]
Convention = Literal["exact", "velocity"]


def velocity_to_score(
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    *,
    path: PathName | AffinePath = "linear",
    convention: Convention = "exact",
    min_sigma: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    r"""Score ∇ₓ log p_t(x) of the density that a velocity field transports.

    For x_t = α_t·a + σ_t·x0 and v(x, t) = E[α̇_t·a + σ̇_t·x0 | x_t = x],

        score = (α_t·v − α̇_t·x) / (σ_t·(α̇_t·σ_t − α_t·σ̇_t)),

    which for the linear path is (t·v − x) / (1 − t). The outer σ_t is bounded below by ``min_sigma``.

    Args:
        velocity: v(x, t), shape (..., d); float32, bfloat16, float16 or float64.
        x: where it was evaluated, (..., d), same device.
        t: time, a number in [0, 1] at which σ_t > 0, or a tensor that broadcasts to (..., 1). The values of a tensor
            are not read, which would synchronise the device: outside [0, 1] they give NaN, and where σ_t is zero
            ``min_sigma`` takes its place.
        path: ``"linear"`` (noise at t = 0, data at t = 1), ``"linear_reversed"`` (data at t = 0), ``"vp"``
            (variance preserving, β from 0.1 to 20), ``"cosine"``, or an :class:`AffinePath`.
        convention: ``"exact"`` as above. ``"velocity"`` is v / (1 − t), what the published implementation of the
            Fisher decorator uses; it is not the score of any density and exists for parity with it (linear path only).
        min_sigma: lower bound of σ_t in the denominator.
        backend: ``None`` takes Triton for CUDA tensors in float32, bfloat16 or float16, PyTorch otherwise; ``"torch"``
            or ``"triton"`` insist. The kernels read contiguous tensors; others are copied first.

    Returns:
        Score (..., d) in the promoted dtype of ``velocity`` and ``x``; computed in float32 at least. Differentiable
        in ``velocity``, ``x`` and a tensor ``t``.

    Raises:
        TypeError: a tensor is missing or not floating point.
        ValueError: shapes do not fit, devices differ, or an option is out of its range.
        RuntimeError: the backend asked for cannot serve these tensors.

    Source: Lipman et al., "Flow Matching Guide and Code" (arXiv 2412.06264), section 4.8; for the linear path it is
    E[x0 | x_t] = x − t·v.

    Example:
        >>> import torch, fdkernels
        >>> x = torch.tensor([[0.3, -0.2]])
        >>> fdkernels.velocity_to_score(torch.zeros(1, 2), x, 0.5)  # −x / (1 − t)
        tensor([[-0.6000,  0.4000]])
    """
    op = "velocity_to_score"
    check_floating(op, velocity=velocity, x=x)
    check_shape(op, "x", x, velocity.shape, "velocity's shape (..., d)")
    if velocity.ndim == 0:
        raise ValueError(f"{op}: velocity must be (..., d), got a scalar")
    resolved = check_score_settings(op, path, convention, min_sigma)
    check_time(op, t, resolved, velocity, (*velocity.shape[:-1], 1))
    triton = choose_backend(op, backend, velocity, x) == "triton"
    return score_from_velocity(velocity, x, t, resolved, convention, min_sigma, triton)


def score_from_velocity(
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    path: AffinePath,
    convention: Convention,
    min_sigma: float,
    triton: bool = False,
) -> Tensor:
    """The conversion, on checked arguments."""
    arguments = (velocity, x, *score_coefficients(velocity, x, t, path, convention, min_sigma))
    if not triton and plain_is_better(*arguments[:3]):
        return score_formula(*arguments)
    return score_operator(*arguments, triton)


def score_coefficients(
    velocity: Tensor, x: Tensor, t: Tensor | float, path: AffinePath, convention: Convention, min_sigma: float
) -> tuple[Tensor | None, float, float, bool]:
    """p and q of score = p·v + q·x: a tensor (..., 2) of pairs or two numbers, and whether there is a q at all.

    A number stays one on a built-in path, and costs the device nothing.
    """
    exact = convention == "exact"
    if not isinstance(t, Tensor) and takes_numbers(path):
        return None, *_coefficients(t, path, exact, min_sigma), exact
    dtype = accumulate_dtype(velocity, x)
    if isinstance(t, Tensor):
        t = t.to(dtype)
        t = torch.where((t >= 0) & (t <= 1), t, torch.nan)
        t = t.reshape((1,) * (velocity.ndim - t.ndim) + t.shape)
    else:
        t = torch.full((1,) * velocity.ndim, t, dtype=dtype, device=x.device)
    return torch.cat(_coefficients(t, path, exact, min_sigma), -1), 1.0, 0.0, exact


def _coefficients(t: Time, path: AffinePath, exact: bool, min_sigma: float) -> tuple[Time, Time]:
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)  # type: ignore[arg-type]
    bounded: Any = sigma.clamp(min=min_sigma) if isinstance(sigma, Tensor) else max(sigma, min_sigma)
    if not exact:
        return 1 / bounded, 0 * bounded
    denominator = bounded * (d_alpha * sigma - alpha * d_sigma)
    return alpha / denominator, -d_alpha / denominator


def check_score_settings(op: str, path: PathName | AffinePath, convention: Convention, min_sigma: float) -> AffinePath:
    check_choice(op, "convention", convention, ("exact", "velocity"))
    check_at_least(op, "min_sigma", min_sigma, 0.0)
    resolved = resolve_path(op, path)
    if convention == "velocity" and resolved is not PATHS["linear"]:
        raise ValueError(f"{op}: convention='velocity' is v / (1 − t), defined for path='linear' only, got {path!r}")
    return resolved


def resolve_path(op: str, path: PathName | AffinePath) -> AffinePath:
    if isinstance(path, AffinePath):
        return path
    if path not in PATHS:
        raise ValueError(f"{op}: path must be an AffinePath or one of {', '.join(map(repr, PATHS))}, got {path!r}")
    return PATHS[path]


def check_time(op: str, t: Tensor | float, path: AffinePath, like: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of times fits ``shape``; a number lies in [0, 1], where the path still holds noise."""
    if isinstance(t, Tensor):
        check_floating(op, like.device, t=t)
        check_broadcast(op, "t", t, shape, "(..., 1)")
        return
    if isinstance(t, bool) or not isinstance(t, (int, float)):
        raise TypeError(f"{op}: t must be a number or a torch.Tensor, got {type(t).__name__}")
    if not 0 <= t <= 1:
        raise ValueError(f"{op}: t must lie in [0, 1], got {t!r}")
    sigma = path.sigma(t if takes_numbers(path) else torch.tensor(t, dtype=torch.float64))  # type: ignore[arg-type]
    if not sigma > 0:
        raise ValueError(f"{op}: t must leave some noise (σ_t > 0) for a score to exist, got t={t!r} with σ_t = 0")
