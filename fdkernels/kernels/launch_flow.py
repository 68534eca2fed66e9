"""From a network, rows of noise and a solver's table to the launch, or launches, of a flow."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fdkernels.backend import float32_products
from fdkernels.kernels import launch_gemm
from fdkernels.kernels.architecture import HALF, Architecture, Penalty, Solver, device_table
from fdkernels.kernels.configs import (
    PROGRAMS_PER_SM,
    FlowPlan,
    flow_plan,
    multiprocessors,
    next_power_of_two,
)
from fdkernels.kernels.flow import flow_kernel
from fdkernels.kernels.graphs import replayed
from fdkernels.kernels.table import gpu_of


def integrate(
    start: Tensor,
    cond: Tensor | None,
    parameters: list[Tensor | None],
    architecture: str,
    table: tuple[float, ...],
    low: float,
    high: float,
    clip: str,
    want_path: bool,
    precision: str,
    implementation: str | None,
) -> Tensor:
    """End of the flow (models, rows, d), or all states (steps + 1, models, rows, d)."""
    models, rows, _ = start.shape
    net, solver = Architecture.decode(architecture), Solver(table, low, high, clip, precision)
    out = start.new_empty((solver.num_steps + 1, *start.shape) if want_path else start.shape)
    if start.numel() == 0:
        return out
    plan = _plan(net, start.device, (models, rows, 1), precision, implementation)
    if plan.implementation == "gemm":
        with _without_autocast(start.device):
            return replayed(launch_gemm.integrate, (start, cond), parameters, net, plan, solver, want_path)[0]
    _launch(
        net, plan, solver, parameters, cond, (models, rows, 1),
        start_ptr=start.contiguous(), end_ptr=None if want_path else out, path_ptr=out if want_path else None,
    )  # fmt: skip
    return out


def fisher(
    start: Tensor | None,
    bridge: Tensor | None,
    cond: Tensor | None,
    displacement: Tensor,
    coefficients: Tensor | None,
    parameters: list[Tensor | None],
    seed: Tensor | None,
    architecture: str,
    table: tuple[float, ...],
    low: float,
    high: float,
    clip: str,
    num_samples: int,
    t: float,
    p: float,
    q: float,
    use_x: bool,
    damping: float,
    normalize: bool,
    eps: float,
    want_score: bool,
    precision: str,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty (models, states), its gradient to the displacement, and the scores (models, states, K, d) where wanted.

    All float32. ``start`` are finished samples where the table is empty; ``coefficients`` (models, states·K, 3) hold
    t, p and q of every row in the place of the numbers.
    """
    models, states, d = displacement.shape
    penalty = displacement.new_empty((models, states), dtype=torch.float32)
    gradient = displacement.new_empty((models, states, d), dtype=torch.float32)
    score = displacement.new_empty((models, states, num_samples, d) if want_score else 0, dtype=torch.float32)
    if penalty.numel() == 0:
        return penalty, gradient, score
    net, solver = Architecture.decode(architecture), Solver(table, low, high, clip, precision)
    plan = _plan(net, displacement.device, (models, states, num_samples), precision, implementation)
    if plan.implementation == "gemm":
        inputs = (start, bridge, cond, displacement, coefficients, seed)
        closing = Penalty(num_samples, t, p, q, use_x, damping, normalize, eps, want_score)
        with _without_autocast(displacement.device):
            penalty, gradient, score = replayed(launch_gemm.fisher, inputs, parameters, net, plan, solver, closing)
        return penalty, gradient, score
    _launch(
        net, plan, solver, parameters, cond, (models, states, num_samples),
        start_ptr=_contiguous(start), seed_ptr=seed, bridge_ptr=_contiguous(bridge),
        displacement_ptr=displacement.contiguous(), coefficient_ptr=_contiguous(coefficients),
        penalty_ptr=penalty, gradient_ptr=gradient, score_ptr=score if want_score else None,
        t_bridge=t, p=p, q=q, damping=damping, eps=eps,
        FISHER=True, NORMALIZE=normalize, USE_X=use_x,
    )  # fmt: skip
    return penalty, gradient, score


def _plan(
    net: Architecture, device: torch.device, shape: tuple[int, int, int], precision: str, implementation: str | None
) -> FlowPlan:
    models, states, num_samples = shape
    # cuBLAS multiplies float32 as PyTorch's global setting says, which is the caller's and is not touched here
    library = precision in HALF or (precision == "highest") == (float32_products() == "highest")
    if implementation == "gemm" and not library:
        raise RuntimeError(
            f"implementation='gemm' with precision={precision!r} needs torch.set_float32_matmul_precision("
            f"{precision!r}), got {float32_products()!r}"
        )
    return flow_plan(
        gpu_of(device), multiprocessors(device), net.widths, net.action_dim,
        any(norm != "none" for norm in net.norms), "half" if precision in HALF else precision, states,
        num_samples, models, implementation, library,
    )  # fmt: skip


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The dtypes are settled."""
    if torch.amp.is_autocast_available(device.type):  # shapes without data have none
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


UNUSED: dict[str, Any] = {
    **dict.fromkeys(("start_ptr", "seed_ptr", "displacement_ptr", "bridge_ptr", "coefficient_ptr")),
    **dict.fromkeys(("end_ptr", "path_ptr", "score_ptr", "penalty_ptr", "gradient_ptr")),
    **dict.fromkeys(("t_bridge", "p", "q", "damping", "eps"), 0.0),
    **dict.fromkeys(("FISHER", "NORMALIZE", "USE_X"), False),
}


def _launch(
    net: Architecture,
    plan: FlowPlan,
    solver: Solver,
    parameters: list[Tensor | None],
    cond: Tensor | None,
    shape: tuple[int, int, int],
    **given: Any,
) -> None:
    models, states, num_samples = shape
    weights, biases, scales, shifts = (tuple(_contiguous(tensor) for tensor in parameters[i::4]) for i in range(4))
    weight = weights[0]
    assert weight is not None
    device = weight.device
    block_k, block_d = next_power_of_two(num_samples), max(16, next_power_of_two(net.action_dim))
    blocks = -(-states * block_k // plan.rows)
    at_once = multiprocessors(device) * (1 if plan.split > 1 else PROGRAMS_PER_SM)
    groups = max(1, min(blocks, at_once // (plan.split * models)))
    programs = models * groups * plan.split
    rows = plan.rows
    widest = max(net.widths)

    def scratch(wanted: bool, dtype: torch.dtype, *size: int) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device=device) if wanted else None

    with torch.cuda.device_of(weight):
        flow_kernel[(programs,)](
            cond_ptr=_contiguous(cond),
            table_ptr=device_table(solver.table, device),
            weights=weights,
            biases=biases,
            scales=scales[:-1],
            shifts=shifts[:-1],
            norm_eps=net.norm_eps,
            share_ptr=scratch(True, torch.float32, programs, rows, net.widths[0]),
            hidden_ptr=scratch(True, solver.hidden_dtype, models * groups, 2, rows, widest),
            wide_ptr=scratch(any(norm != "none" for norm in net.norms), torch.float32, programs, rows, widest),
            partial_ptr=scratch(plan.split > 1, torch.float32, models * groups, plan.split, rows, block_d),
            counter_ptr=torch.zeros(models * groups, dtype=torch.int32, device=device) if plan.split > 1 else None,
            num_states=states,
            num_models=models,
            rows_per_cond=1 if cond is None else models * states * num_samples // cond[..., 0].numel(),
            num_evals=solver.num_evals,
            groups_per_model=groups,
            D=net.action_dim,
            BLOCK_D=block_d,
            K=num_samples,
            BLOCK_K=block_k,
            COND=net.cond_dim,
            AT_COND=net.column("cond"),
            AT_X=net.column("x"),
            AT_T=net.column("t"),
            WIDTHS=net.widths,
            WIDEST=widest,
            ACTIVATIONS=net.activations,
            NORMS=net.norms,
            PRECISION=solver.dot_precision,
            low=solver.low,
            high=solver.high,
            CLIP=solver.clip,
            ROWS=rows,
            SPLIT=plan.split,
            BLOCK_N=plan.block_n,
            BLOCK_INPUTS=plan.block_inputs,
            STAGES=plan.num_stages,
            num_warps=plan.num_warps,
            **({"launch_cooperative_grid": True} if plan.split > 1 else {}),  # the programs of a group wait for another
            **(UNUSED | given),
        )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
