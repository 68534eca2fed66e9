"""The whole chain of the Fisher decorator: sample the behaviour flow, score the samples, weigh a displacement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import MAX_PENALTY_D, Backend, Implementation, Precision, choose_backend, choose_fused
from fdkernels.condition import Condition, check_condition, for_samples
from fdkernels.events import check_event, check_event_dim, check_samples, flat, shaped
from fdkernels.noise import check_source, draw
from fdkernels.ops.chain import chain
from fdkernels.ops.integrate import prepare
from fdkernels.ops.penalty import penalty_from_score
from fdkernels.ops.score import score_from_velocity
from fdkernels.ops.velocity_penalty import penalty_from_velocity
from fdkernels.paths import PATHS, AffinePath, PathName, near_data
from fdkernels.records import (
    REDUCTIONS,
    Chain,
    Convention,
    Noise,
    Normalize,
    PenaltyRule,
    Reduction,
    ScoreRule,
    TimedAffine,
    Way,
    check_penalty_rule,
    check_score_rule,
    check_time,
    reduce,
)
from fdkernels.solvers import Method, Solver, check_solver, integrate
from fdkernels.torch_private import transforms_active
from fdkernels.validation import check_choice, check_count, check_flag, check_floating
from fdkernels.velocity import BoundVelocity, Velocity, bind

_MAX_SAMPLES = 64
"""The most samples of one state that a program of the kernel keeps together."""


def flow_fisher_penalty(
    velocity: Velocity,
    cond: Condition,
    displacement: Tensor,
    *,
    path: PathName | AffinePath = "linear",
    num_samples: int = 4,
    t: float | Tensor | None = None,
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
    event_dim: int = 1,
    precision: Precision | None = None,
    backend: Backend | None = None,
    implementation: Implementation | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Fisher penalty of a displacement under the behaviour flow itself.

    For each state, K samples a_k of the flow are brought to time t by fresh noise, x_k = σ_t·x0_k + α_t·a_k, which is
    (1−t)·x0_k + t·a_k on the linear path; the velocity there gives the score s_k (:func:`velocity_to_score`), and the
    scores weigh the displacement (:func:`fisher_penalty`). For a packed MLP on CUDA one launch (or, for many rows, one
    CUDA graph) does it all, and saves the gradient to the displacement; given a ``seed``, it draws the noise as well.

    Args:
        velocity: as in :func:`integrate_flow`; a callable gets x (..., K, d), t (..., K, 1), cond (..., K, c), and for
            chunks x (N, horizon, width), t (N, 1, 1), cond (N, ...), with the K rows of a state next to each other.
        cond: states (..., c). For a callable also a floating-point tensor with more dimensions, such as tokens
            (..., T, c), and dicts, tuples and lists of tensors of any dtype, all with the displacement's leading shape,
            and None; containers reach it as in :func:`integrate_flow`. The K samples of a state get the same.
        displacement: δ (..., d), same leading shape and device.
        path: the path that the flow was trained on, as in :func:`velocity_to_score` and :func:`integrate_flow`. The
            flow starts from N(0, I), so σ should be 1 at the noise's end; give ``noise`` or ``samples`` if it is not.
        num_samples: K. Ignored if ``noise``, ``bridge_noise`` or ``samples`` is given, whose K is used.
        t: time at which the score is taken, a number in [0, 1] at which σ_t > 0, or a tensor that broadcasts to
            (..., K, 1), for chunks to (..., K, 1, 1); see :func:`velocity_to_score`. None is 0.05 from the data's end:
            0.95, and 0.05 on a path whose data are at t = 0.
        num_steps, method, time_grid, clip, clip_each_step: of the flow, as in :func:`integrate_flow`; the grid runs
            from noise to data.
        damping, normalize, eps, reduction: as in :func:`fisher_penalty`.
        convention, min_sigma: as in :func:`velocity_to_score`.
        noise: start of the samples, (..., K, d); drawn N(0, I) when None.
        bridge_noise: x0_k of the bridge, (..., K, d); drawn when None.
        samples: a_k, (..., K, d), if the flow has been integrated already, as by :func:`integrate_flow_groups`.
            Nothing is integrated then, the options of the solver have no effect, and ``noise`` must be None.
        generator: draws ``noise``, then ``bridge_noise``, in the dtype of ``cond``, or of the displacement if ``cond``
            is not a tensor. PyTorch's global one when None.
        seed: draw with a counter-based generator instead: the same numbers on every device and backend, whatever was
            drawn before. With n the number of elements of (..., K, d), ``noise`` has positions 0 ... n - 1 and
            ``bridge_noise`` n ... 2n - 1 of :func:`fdkernels.philox.philox_normal`. An int of 64 bits, or a 0-d
            integer tensor on the device, which the host does not read.
        return_score: also return the scores (..., K, d), in the dtype of the samples.
        event_dim: how many of the last dimensions make one action, as in :func:`integrate_flow`. For chunks it is 2:
            δ is (..., horizon, width), noise, samples and scores are (..., K, horizon, width), and the penalty is that
            of the flattened action, with d = horizon·width.
        precision, backend, implementation: as in :func:`integrate_flow`.

    Returns:
        Penalty (...) or a scalar, and the scores when asked. Differentiable in ``displacement`` only: samples,
        velocities and scores are constants (stop-gradient), as in the published method.

    Raises:
        TypeError: an argument, or what velocity returns, has the wrong type, such as a tensor that is not floating
            point or not dense.
        ValueError: shapes do not fit, devices or dtypes differ, an option is out of its range, or two options exclude
            each other.
        RuntimeError: the backend or the precision asked for is not available here.

    Source: "Fisher Decorator" (arXiv 2604.17919).

    Example:
        >>> import torch, fdkernels
        >>> flow = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32))
        >>> states, displacement = torch.randn(256, 17), torch.zeros(256, 6, requires_grad=True)
        >>> fdkernels.flow_fisher_penalty(flow, states, displacement, num_samples=4).shape
        torch.Size([256])
    """
    op = "flow_fisher_penalty"
    device = check_floating(op, displacement=displacement)
    event_dim = check_event_dim(op, event_dim)
    event, lead = check_event(op, "displacement", displacement, event_dim), displacement.shape[:-event_dim]
    check_condition(op, "cond", cond, lead, device, "the displacement", broadcasts=False)
    given = {"samples": samples, "noise": noise, "bridge_noise": bridge_noise}
    shape = (*lead, _check_given(op, given, num_samples, displacement, event_dim), *event)
    seed = check_source(op, seed, generator, device)
    score_rule = check_score_rule(op, path, convention, min_sigma)
    t = near_data(op, score_rule.path, 0.05) if t is None else t
    t = check_time(t, score_rule, displacement, shape[:-event_dim], event_dim)
    rule = check_penalty_rule(op, damping, normalize, eps)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_flag(op, "return_score", return_score)
    solver = check_solver(op, num_steps, time_grid, method, clip, clip_each_step, score_rule.path, samples is None)
    like = cond if isinstance(cond, Tensor) else displacement
    start = noise if samples is None else samples
    bound = bind(op, velocity, like if start is None else start, precision, event)
    displacement = flat(displacement, event_dim)
    start, bridge_noise = flat(start, event_dim), flat(bridge_noise, event_dim)
    fused = choose_fused(op, backend, implementation, bound.packed, (displacement, like))

    # The kernel can draw from a seed by itself, but cannot see which of its rows a transform has joined.
    transformed = not torch.compiler.is_compiling() and transforms_active()
    if not fused or seed is None or transformed:
        shape = (*shape[:-event_dim], math.prod(event))
        with torch.no_grad():
            start = draw(shape, like, generator, seed) if start is None else start
            first = math.prod(shape)
            bridge_noise = draw(shape, like, generator, seed, first) if bridge_noise is None else bridge_noise
        seed = None
    # What the kernel draws has the dtype of `like`, and no tensor yet.
    rows = like.new_empty(0, displacement.shape[-1]) if start is None else start
    bound.check_rows(rows, cond, "noise" if samples is None else "samples", "cond", len(lead))
    request = _Request(
        cond, displacement, start, bridge_noise, seed, shape[len(lead)], t, solver, score_rule, rule, return_score
    )
    if fused:
        penalty, score = _fused(request, bound, bound.way(implementation))
    else:
        penalty, score = _step_by_step(request, bound, backend)
    penalty = reduce(penalty, reduction)
    if score is None:
        return penalty
    return penalty, shaped(score, event).to(like.dtype if start is None else start.dtype)


class _Request(NamedTuple):
    """The checked arguments, with actions as rows (..., d).

    Noise is drawn already, except what the kernel draws from the seed.
    """

    cond: Condition
    displacement: Tensor
    start: Tensor | None
    bridge_noise: Tensor | None
    seed: int | Tensor | None
    num_samples: int
    t: Tensor | float
    solver: Solver
    score_rule: ScoreRule
    rule: PenaltyRule
    return_score: bool


def _check_given(
    op: str, given: dict[str, Tensor | None], num_samples: int, displacement: Tensor, event_dim: int
) -> int:
    """The number of samples: that of a given tensor, or else the one asked for."""
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    if tensors:
        check_floating(op, displacement.device, **tensors)
    if given["samples"] is not None and given["noise"] is not None:
        raise ValueError(f"{op}: samples and noise exclude each other, for given samples are not integrated again")
    for name, tensor in tensors.items():
        check_samples(op, displacement, name, tensor, event_dim)
    counts = [tensor.shape[-event_dim - 1] for tensor in tensors.values()]
    if not counts:
        return check_count(op, "num_samples", num_samples)
    if any(count != counts[0] for count in counts):
        raise ValueError(f"{op}: {' and '.join(tensors)} must have the same K, got {' and '.join(map(str, counts))}")
    check_count(op, f"K, the number of samples in {' and '.join(tensors)},", counts[0])
    return counts[0]


def _fused(request: _Request, bound: BoundVelocity, way: Way) -> tuple[Tensor, Tensor | None]:
    """Penalty (...) and, if asked, scores (..., K, d), in float32, by one launch or one graph of launches."""
    displacement, num_samples, seed = request.displacement, request.num_samples, request.seed
    device = displacement.device
    cond = request.cond
    assert cond is None or isinstance(cond, Tensor), "check_rows checks this"
    prepare(request.solver, device)
    lead, d = displacement.shape[:-1], displacement.shape[-1]
    together = num_samples <= _MAX_SAMPLES
    rows = displacement.reshape(1, -1, d)
    if not together:  # too many samples for one program: compute the scores first
        rows = rows.new_zeros((1, rows.shape[1] * num_samples, d))
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=device)

    def rows_of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(1, -1, tensor.shape[-1])

    want_score = request.return_score or not together
    noise = Noise(rows_of(request.start), rows_of(request.bridge_noise), seed, num_samples if together else 1)
    at = _timed(request, (*lead, num_samples))
    obs = rows_of(cond) if cond is not None and cond.shape[-1] else None
    penalty, score = chain(Chain(noise, obs, rows, at, bound.encoded(), request.solver, request.rule, want_score, way))
    scores = score.reshape(*lead, num_samples, d) if want_score else None
    if scores is not None and not together:
        penalty = penalty_from_score(displacement, scores, request.rule, triton=True)
    return penalty.reshape(lead), scores if request.return_score else None


def _timed(request: _Request, rows: tuple[int, ...]) -> TimedAffine:
    """t, α, σ, p and q of the samples; numbers if all samples have the same."""
    t, rule, like = request.t, request.score_rule, request.displacement.unsqueeze(-2)
    affine = rule.affine(t, like, like)
    if affine.pairs is None:
        assert not isinstance(t, Tensor)
        alpha, sigma = (None, None) if rule.path is PATHS["linear"] else rule.levels(t, like.device)
        return TimedAffine(None, t, alpha, sigma, affine.p, affine.q, affine.use_x)
    at = (t if isinstance(t, Tensor) else torch.full((1,), t, device=like.device)).to(torch.float32)
    columns = [column.expand(*rows, 1) for column in (at, *rule.levels(at, like.device))]
    table = torch.cat([*columns, affine.pairs.to(torch.float32).expand(*rows, 2)], -1)
    return TimedAffine(table.reshape(1, -1, 5), 0.0, None, None, affine.p, affine.q, affine.use_x)


def _step_by_step(request: _Request, bound: BoundVelocity, backend: Backend | None) -> tuple[Tensor, Tensor | None]:
    """The same penalty and scores, but PyTorch integrates and separate operators do the rest."""
    start, bridge_noise, t, solver = request.start, request.bridge_noise, request.t, request.solver
    displacement, score_rule, rule = request.displacement, request.score_rule, request.rule
    assert start is not None
    assert bridge_noise is not None
    with torch.no_grad():
        with bound.context(start.device):
            cond = for_samples(request.cond, displacement.shape[:-1])
            field, x = bound.flow()(start, cond)
            if solver.times:
                x = integrate(field, x, solver)
            if isinstance(t, Tensor):
                t = t.detach().to(x.dtype)
            alpha, sigma = score_rule.levels(t, x.device)
            x_t = sigma * bridge_noise.to(x.dtype) + alpha * x
            v_t = field(x_t, t)
        score = score_from_velocity(v_t, x_t, t, score_rule) if request.return_score else None
    triton = choose_backend(bound.op, backend, displacement, x_t, max_d=MAX_PENALTY_D) == "triton"
    if score is None:
        return penalty_from_velocity(displacement, v_t, x_t, t, score_rule, rule, triton), None
    return penalty_from_score(displacement, score, rule, triton), score
