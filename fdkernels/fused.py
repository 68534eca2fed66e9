"""From checked arguments to the flow's operators, and when they serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fdkernels import groups
from fdkernels.backend import Backend, choose_backend, float32_products
from fdkernels.flow_operators import architecture_and_parameters, fisher_operator, integrate_operator, prepare_solver
from fdkernels.mlp import PackedMLP
from fdkernels.operators import penalty_operator
from fdkernels.solvers import Method
from fdkernels.validation import check_choice

Implementation = Literal["stationary", "streamed", "gemm"]
MAX_D = 128
MAX_SAMPLES = 64  # of one state, which one program keeps together


def choose_fused(
    op: str,
    backend: Backend | None,
    implementation: Implementation | None,
    velocity: Any,
    tensors: Sequence[Tensor],
    differentiable: bool = False,
) -> bool:
    """Whether the kernels integrate; a choice that cannot be honoured raises.

    ``backend`` and ``implementation`` None take them for a packed MLP on CUDA. The plain path serves everything else.
    """
    check_choice(op, "implementation", implementation, (None, "stationary", "streamed", "gemm"))  # type: ignore[arg-type]
    if backend == "torch":
        if implementation is not None:
            raise ValueError(
                f"{op}: implementation={implementation!r} belongs to backend='triton', got backend='torch'"
            )
        return False
    reason = _why_not(velocity, differentiable)
    insisted = backend == "triton" or implementation is not None
    asked = "backend='triton'" if implementation is None else f"implementation={implementation!r}"
    if reason is not None:
        if insisted:
            raise RuntimeError(f"{op}: {asked} {reason}; leave the choice open")
        choose_backend(op, backend, *tensors)
        return False
    tensors = (*tensors, *(layer.linear.weight for layer in velocity.layers))
    return choose_backend(op, "triton" if insisted else None, *tensors, asked=asked) == "triton"


def _why_not(velocity: Any, differentiable: bool) -> str | None:
    """What about the network the kernels do not serve; devices and dtypes aside."""
    if not isinstance(velocity, PackedMLP):
        return "serves a VelocityMLP or a packed MLP, and this velocity is neither"
    if differentiable and torch.is_grad_enabled():
        return "has no gradient through the solver, which differentiable=True asks for"
    if len(velocity.layers) < 2:
        return "serves networks with a hidden layer, got a linear velocity"
    if velocity.action_dim > MAX_D:
        return f"serves up to {MAX_D} dimensions, got {velocity.action_dim}"
    if any(layer.norm_before and layer.norm_after for layer in velocity.layers):
        return "serves one layer norm in a layer, got one before and one after an activation"
    return None


def _resolve(precision: str | None, mlp: PackedMLP) -> str:
    """ "highest", "high", "bf16" or "fp16": what ``None`` stands for here."""
    if precision is not None:
        return precision
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    device = mlp.layers[0].linear.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else mlp.dtype
    return half.get(dtype) or ("highest" if float32_products() == "highest" else "high")


def fused_integrate(
    mlp: PackedMLP,
    x0: Tensor,
    cond: Tensor | None,
    times: list[float],
    method: Method,
    clip: tuple[float, float] | None,
    clip_each_step: bool,
    return_path: bool,
    precision: str | None,
    implementation: Implementation | None,
) -> Tensor:
    """(..., d), or the states at all times (S + 1, ..., d)."""
    if torch.compiler.is_compiling():
        prepare_solver(tuple(times), method, x0.device)
    architecture, parameters = architecture_and_parameters(mlp)
    out = integrate_operator(
        x0.detach().reshape(1, -1, x0.shape[-1]), _rows_of_cond(cond, x0.shape[:-1]), parameters, architecture, times,
        method, *_clip(clip, clip_each_step), return_path, _resolve(precision, mlp), implementation,
    )  # fmt: skip
    return out.reshape(len(times), *x0.shape) if return_path else out.reshape(x0.shape)


def fused_integrate_groups(
    mlp: PackedMLP, x0s: Sequence[Tensor], conds: Sequence[Tensor | None], *settings: Any
) -> tuple[Tensor, ...]:
    """All groups in one call of the operator."""
    rows, cond = groups.join(x0s, conds)
    return groups.split(fused_integrate(mlp, rows, cond, *settings), x0s)


def fused_penalty(
    mlp: PackedMLP,
    cond: Tensor,
    displacement: Tensor,
    start: Tensor | None,
    bridge: Tensor | None,
    seed: int | Tensor | None,
    num_samples: int,
    times: list[float],
    method: Method,
    clip: tuple[float, float] | None,
    clip_each_step: bool,
    t: float | Tensor,
    coefficients: tuple[Tensor | None, float, float, bool],
    damping: float,
    normalize: bool,
    eps: float,
    want_score: bool,
    precision: str | None,
    implementation: Implementation | None,
) -> tuple[Tensor, Tensor | None]:
    """Penalty (...) and, where asked, scores (..., K, d), float32. ``start`` are samples where there are no times."""
    if torch.compiler.is_compiling():
        prepare_solver(tuple(times), method, cond.device)
    architecture, parameters = architecture_and_parameters(mlp)
    lead, d = displacement.shape[:-1], displacement.shape[-1]
    pairs, p, q, use_x = coefficients
    triples = None
    if pairs is not None:  # t, p and q of every row
        at = t if isinstance(t, Tensor) else torch.full((), t, device=cond.device)
        shape = (*lead, num_samples)
        triples = torch.cat((at.expand(*shape, 1).to(torch.float32), pairs.expand(*shape, 2).to(torch.float32)), -1)
        triples = triples.reshape(1, -1, 3)
    whole = num_samples <= MAX_SAMPLES
    rows = displacement.reshape(1, -1, d)
    if not whole:  # too many samples for one program: their scores first
        rows = rows.new_zeros((1, rows.shape[1] * num_samples, d))

    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=cond.device)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(1, -1, d)

    penalty, _, score = fisher_operator(
        flat(start), flat(bridge), cond.detach().reshape(1, -1, cond.shape[-1]) if mlp.cond_dim else None, rows,
        triples, parameters, seed, architecture, times, method, *_clip(clip, clip_each_step),
        num_samples if whole else 1, float(t) if triples is None else 0.0, p, q, use_x, damping, normalize, eps,
        want_score or not whole, _resolve(precision, mlp), implementation,
    )  # fmt: skip
    scores = score.reshape(*lead, num_samples, d) if want_score or not whole else None
    if not whole:
        assert scores is not None
        penalty = penalty_operator(displacement, scores, damping, normalize, eps, False, False, True)[0]
        return penalty, scores if want_score else None
    return penalty.reshape(lead), scores


def _clip(clip: tuple[float, float] | None, clip_each_step: bool) -> tuple[float, float, str]:
    if clip is None:
        return 0.0, 0.0, "never"
    return float(clip[0]), float(clip[1]), "step" if clip_each_step else "end"


def _rows_of_cond(cond: Tensor | None, lead: torch.Size) -> Tensor | None:
    """cond as (1, rows, c), each row for as many neighbouring rows of the flow; spread out where that cannot be."""
    if cond is None or cond.shape[-1] == 0:
        return None
    width = cond.shape[-1]
    cond = cond.detach().reshape((1,) * (len(lead) + 1 - cond.ndim) + tuple(cond.shape))
    shared = len(lead)
    while shared and cond.shape[shared - 1] == 1:
        shared -= 1
    if cond.shape[:shared] != lead[:shared]:
        cond = cond.expand(*lead, width)
    return cond.reshape(1, -1, width)
