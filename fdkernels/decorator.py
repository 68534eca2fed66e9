"""The whole chain of the Fisher decorator: sample the behaviour flow, score the samples, weigh a displacement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.backend import Backend, choose_backend
from fdkernels.fisher import Normalize, Reduction, check_penalty_settings, penalty_from_score, reduce
from fdkernels.flow import Precision, Velocity, as_velocity, bind_flow, check_precision, check_rows, check_solver
from fdkernels.fused import Implementation, choose_fused, fused_penalty
from fdkernels.mlp import PackedMLP
from fdkernels.philox import check_seed, philox_normal
from fdkernels.score import Convention, check_score_settings, check_time, score_coefficients, score_from_velocity
from fdkernels.solvers import Method, check_time_grid, integrate
from fdkernels.torch_private import transforms_active
from fdkernels.validation import check_count, check_floating, check_shape
from fdkernels.velocity_penalty import penalty_from_velocity


def flow_fisher_penalty(
    velocity: Velocity,
    cond: Tensor,
    displacement: Tensor,
    *,
    num_samples: int = 4,
    t: float | Tensor = 0.95,
    num_steps: int = 10,
    method: Method = "euler",
    time_grid: Sequence[float] | Tensor | None = None,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    clip_each_step: bool = False,
    damping: float = 1e-3,
    normalize: Normalize = "trace",
    eps: float = 1e-6,
    reduction: Reduction = "none",
    convention: Convention = "exact",
    min_sigma: float = 1e-6,
    noise: Tensor | None = None,
    bridge_noise: Tensor | None = None,
    samples: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_score: bool = False,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Fisher penalty of a displacement under the behaviour flow itself.

    For each state, K samples a_k of the flow are brought to time t by fresh noise, x_k = (1−t)·x0_k + t·a_k; the
    velocity there gives the score s_k (:func:`velocity_to_score`), and the scores weigh the displacement
    (:func:`fisher_penalty`). For a packed MLP on CUDA one launch does it all (or one CUDA graph, where there are many
    rows), and leaves behind the gradient to the displacement; from a ``seed`` it draws the noise as well.

    Args:
        velocity: as in :func:`integrate_flow`; a callable gets x (..., K, d), t (..., K, 1), cond (..., K, c).
        cond: states (..., c).
        displacement: δ (..., d), same leading shape and device.
        num_samples: K. Ignored when ``noise``, ``bridge_noise`` or ``samples`` says it.
        t: where the score is taken, a number in [0, 1) or a tensor that broadcasts to (..., K, 1); see
            :func:`velocity_to_score`.
        num_steps, method, time_grid, clip, clip_each_step: of the flow, as in :func:`integrate_flow`; the grid runs
            from noise to data.
        damping, normalize, eps, reduction: as in :func:`fisher_penalty`.
        convention, min_sigma: as in :func:`velocity_to_score`.
        noise: where the samples start, (..., K, d); drawn N(0, I) when None.
        bridge_noise: x0_k of the bridge, (..., K, d); drawn when None.
        samples: a_k, (..., K, d), where the flow has been integrated already, as by :func:`integrate_flow_groups`.
            Nothing is integrated then, the options of the solver play no part, and ``noise`` must be None.
        generator: draws ``noise``, then ``bridge_noise``, in the dtype of ``cond``. PyTorch's global one when None.
        seed: draw with a counter-based generator instead: the same numbers on every device and backend, whatever was
            drawn before. With n the number of elements of (..., K, d), ``noise`` has positions 0 ... n - 1 and
            ``bridge_noise`` n ... 2n - 1 of :func:`fdkernels.philox.philox_normal`. An int of 64 bits, or a 0-d
            integer tensor on the device, which is not read by the host.
        return_score: also return the scores (..., K, d), in the dtype of the samples.
        precision, backend, implementation: as in :func:`integrate_flow`.

    Returns:
        Penalty (...) or a scalar, and the scores when asked. Differentiable in ``displacement`` only: samples,
        velocities and scores are constants (stop-gradient), as in the published method.

    Raises:
        TypeError: a tensor is not floating point, velocity is not callable.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, or two exclude each
            other.
        RuntimeError: the backend or the precision asked for cannot be had here.

    Source: "Fisher Decorator" (arXiv 2604.17919).

    Example:
        >>> import torch, fdkernels
        >>> flow = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32))
        >>> states, displacement = torch.randn(256, 17), torch.zeros(256, 6, requires_grad=True)
        >>> fdkernels.flow_fisher_penalty(flow, states, displacement, num_samples=4).shape
        torch.Size([256])
    """
    op = "flow_fisher_penalty"
    check_floating(op, cond=cond, displacement=displacement, noise=noise, bridge_noise=bridge_noise, samples=samples)
    if displacement.ndim == 0 or displacement.shape[-1] == 0:
        raise ValueError(f"{op}: displacement must be (..., d) with d of at least 1, got {tuple(displacement.shape)}")
    lead, d = displacement.shape[:-1], displacement.shape[-1]
    if cond.ndim == 0 or cond.shape[:-1] != lead:
        raise ValueError(
            f"{op}: cond must be (..., c) with the displacement's leading shape {tuple(lead)}, got {tuple(cond.shape)}"
        )
    if samples is not None and noise is not None:
        raise ValueError(f"{op}: samples and noise exclude each other, for given samples are not integrated again")
    if seed is not None and generator is not None:
        raise ValueError(f"{op}: seed and generator exclude each other")
    drawn_by = None if seed is None else check_seed(op, seed, cond.device)
    tensors = {"samples": samples, "noise": noise, "bridge_noise": bridge_noise}
    given_counts = [given.shape[-2] for given in tensors.values() if given is not None and given.ndim >= 2]
    num_samples = given_counts[0] if given_counts else num_samples
    check_count(op, "num_samples", num_samples)
    shape = (*lead, num_samples, d)
    for name, given in tensors.items():
        if given is not None:
            check_shape(op, name, given, shape, "(..., K, d)")
    linear = check_score_settings(op, "linear", convention, min_sigma)
    check_time(op, t, linear, displacement, (*lead, num_samples, 1))
    check_penalty_settings(op, damping, normalize, eps, reduction)
    check_solver(op, method, clip, clip_each_step)
    check_precision(op, precision)
    times = check_time_grid(op, num_steps, time_grid)
    velocity = as_velocity(op, velocity)
    start = noise if samples is None else samples
    fused = choose_fused(op, backend, implementation, velocity, (displacement, cond))

    # The kernel draws from a seed by itself, but cannot see which of its rows a transform has put together.
    transformed = not torch.compiler.is_compiling() and transforms_active()
    if not fused or seed is None or transformed:
        with torch.no_grad():
            start, bridge_noise = _drawn(start, bridge_noise, shape, cond, generator, drawn_by)
        drawn_by = None
    if fused:
        assert isinstance(velocity, PackedMLP)
        rows = cond.new_empty(0, d) if start is None else start
        name = "noise" if samples is None else "samples"
        check_rows(op, velocity, rows, cond, name, "cond", not torch.is_autocast_enabled(cond.device.type))
        like = displacement.unsqueeze(-2)
        penalty, score = fused_penalty(
            velocity, cond, displacement, start, bridge_noise, drawn_by, num_samples, times if samples is None else [],
            method, clip, clip_each_step, t, score_coefficients(like, like, t, linear, convention, min_sigma),
            damping, normalize == "trace", eps, return_score, precision, implementation,
        )  # fmt: skip
        penalty = reduce(penalty, reduction)
        return penalty if score is None else (penalty, score.to(rows.dtype))

    with torch.no_grad():
        assert start is not None
        assert bridge_noise is not None
        flow, context = bind_flow(op, velocity, start, precision)
        with context:
            field, x = flow(start, cond.unsqueeze(-2), "noise" if samples is None else "samples", "cond")
            if samples is None:
                x = integrate(field, x, times, method, clip, clip_each_step)
            if isinstance(t, Tensor):
                t = t.detach().to(x.dtype)
            x_t = (1 - t) * bridge_noise.to(x.dtype) + t * x
            v_t = field(x_t, t)
        score = score_from_velocity(v_t, x_t, t, linear, convention, min_sigma) if return_score else None
    triton = choose_backend(op, backend, displacement, x_t) == "triton"
    if score is None:
        penalty = penalty_from_velocity(
            displacement, v_t, x_t, t, linear, convention, min_sigma, damping, normalize, eps, triton
        )
        return reduce(penalty, reduction)
    penalty = penalty_from_score(displacement, score, damping, normalize, eps, triton)
    return reduce(penalty, reduction), score.to(start.dtype)


def _drawn(
    noise: Tensor | None,
    bridge_noise: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both noises, those that are None drawn."""

    def draw(first: int) -> Tensor:
        if seed is not None:
            return philox_normal(seed, shape, like.device, like.dtype, first=first)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    return (
        draw(0) if noise is None else noise,
        draw(math.prod(shape)) if bridge_noise is None else bridge_noise,
    )
