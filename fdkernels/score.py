"""From the velocity of a flow to the score of its marginal density."""

from __future__ import annotations

from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.ops.score import score_from_velocity
from fdkernels.paths import AffinePath, PathName
from fdkernels.records import Convention, check_score_rule, check_time
from fdkernels.validation import check_floating, check_shape


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
        x: the points at which it was evaluated, (..., d), same device.
        t: time, a number in [0, 1] at which σ_t > 0, or a tensor that broadcasts to (..., 1). The values of a
            tensor are not read, because that would synchronise the device: times outside [0, 1] give NaN, and
            ``min_sigma`` replaces a σ_t of zero. For chunks (..., horizon, d), a time of shape (..., 1, 1) serves one.
        path: ``"linear"`` (noise at t = 0, data at t = 1), ``"linear_reversed"`` (data at t = 0), ``"vp"``
            (variance preserving, β from 0.1 to 20), ``"cosine"``, or an :class:`AffinePath`.
        convention: ``"exact"`` as above. ``"velocity"`` is v / (1 − t), as in the published implementation of
            the Fisher decorator. It is not the score of any density and exists only for parity (linear path only).
        min_sigma: lower bound of σ_t in the denominator.
        backend: ``None`` picks Triton for CUDA tensors in float32, bfloat16 or float16, otherwise PyTorch; ``"torch"``
            and ``"triton"`` insist on one. The kernels read contiguous tensors; others are copied first.

    Returns:
        Score (..., d) in the promoted dtype of ``velocity`` and ``x``; computed in float32 at least. Differentiable
        in ``velocity``, ``x`` and a tensor ``t``.

    Raises:
        TypeError: an argument has the wrong type, such as a tensor that is not floating point or not dense.
        ValueError: shapes do not fit, devices differ, or an option is out of its range.
        RuntimeError: the backend asked for cannot serve these tensors.

    Source: Lipman et al., "Flow Matching Guide and Code" (arXiv 2412.06264), section 4.8. On the linear path it follows
    from E[x0 | x_t] = x − t·v.

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
    rule = check_score_rule(op, path, convention, min_sigma)
    t = check_time(t, rule, velocity, velocity.shape[:-1], 1)
    triton = choose_backend(op, backend, velocity, x) == "triton"
    return score_from_velocity(velocity, x, t, rule, triton)
