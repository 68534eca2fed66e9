"""Launch a flow, given a network, rows of noise and a solver."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels.backend import HALF, float32_products
from fdkernels.kernels.flow import gemm
from fdkernels.kernels.flow.arguments import Bridge, Fisher, Rows, Scratch, Weights
from fdkernels.kernels.flow.graphs import replayed
from fdkernels.kernels.flow.jacobian import jacobian_kernel
from fdkernels.kernels.flow.kernel import flow_kernel
from fdkernels.kernels.flow.timetable import Timetable, timetable
from fdkernels.kernels.tuning.plans import PROGRAMS_PER_SM, FlowPlan, Problem, flow_plan, lanes, multiprocessors
from fdkernels.kernels.tuning.table import gpu_of
from fdkernels.kernels.tuning.tiles import next_power_of_two
from fdkernels.layers import EncodedNetwork
from fdkernels.records import Chain, Way
from fdkernels.solvers import Solver


class Shape(NamedTuple):
    models: int
    states: int
    num_samples: int


class Job(NamedTuple):
    network: EncodedNetwork
    plan: FlowPlan
    table: Timetable
    shape: Shape


def integrate(
    start: Tensor, cond: Tensor | None, network: EncodedNetwork, solver: Solver, want_path: bool, way: Way
) -> Tensor:
    """The end of the flow (models, rows, d), or all states (steps + 1, models, rows, d)."""
    table, shape = timetable(solver, way.precision), Shape(start.shape[0], start.shape[1], 1)
    out = start.new_empty((table.num_steps + 1, *start.shape) if want_path else start.shape)
    if start.numel() == 0:
        return out
    plan = _plan("integrate_flow", network, start.device, shape, way)
    if plan.implementation == "gemm":
        inputs, solve = gemm.Inputs(start, cond), gemm.Solve(network.text, plan, table, want_path)
        with _without_autocast(start.device):
            return replayed(gemm.integrate, inputs, network.parameters, solve)[0]
    rows = Rows(start.contiguous(), None, _contiguous(cond), table.on(start.device))
    job = Job(network, plan, table, shape)
    _launch(job, rows, end=None if want_path else out, path=out if want_path else None)
    return out


def fisher(call: Chain) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty (models, states), its gradient to the displacement and, if wanted, the scores (models, states, K, d).

    All are float32.
    """
    displacement, noise, at, rule = call.displacement, call.noise, call.at, call.rule
    device, shape = displacement.device, Shape(displacement.shape[0], displacement.shape[1], noise.num_samples)
    penalty = displacement.new_empty(shape[:2], dtype=torch.float32)
    gradient = displacement.new_empty(displacement.shape, dtype=torch.float32)
    score = displacement.new_empty((*shape, displacement.shape[-1]) if call.want_score else 0, dtype=torch.float32)
    if penalty.numel() == 0:
        return penalty, gradient, score
    table = timetable(call.solver, call.way.precision)
    plan = _plan("flow_fisher_penalty", call.network, device, shape, call.way)
    if plan.implementation == "gemm":
        inputs = gemm.Inputs(noise.start, call.cond, noise.seed, noise.bridge, at.columns, displacement)
        closing = gemm.Closing(noise.num_samples, at._replace(columns=None), rule, call.want_score)
        solve = gemm.Solve(call.network.text, plan, table, False, closing)
        with _without_autocast(device):
            penalty, gradient, score = replayed(gemm.fisher, inputs, call.network.parameters, solve)
        return penalty, gradient, score
    closing_arguments = Fisher(
        Bridge(_contiguous(noise.bridge), _contiguous(at.columns), at.t, at.alpha, at.sigma), at.p, at.q,
        rule.damping, rule.eps, displacement.contiguous(), penalty, gradient, score if call.want_score else None,
    )  # fmt: skip
    rows = Rows(_contiguous(noise.start), noise.seed, _contiguous(call.cond), table.on(device))
    job = Job(call.network, plan, table, shape)
    _launch(job, rows, fisher=closing_arguments, normalize=rule.normalize, use_x=at.use_x)
    return penalty, gradient, score


def jacobian(
    start: Tensor, cond: Tensor | None, network: EncodedNetwork, solver: Solver, way: Way
) -> tuple[Tensor, Tensor]:
    """The end of the flow (models, rows, d), and its Jacobian before clipping (models, rows, d, d) in float32."""
    assert solver.clip != "step", "the Jacobian of clipped steps is not implemented"
    (models, states, d), device, net = start.shape, start.device, network.architecture
    end, columns = start.new_empty(start.shape), start.new_empty((*start.shape, d), dtype=torch.float32)
    if start.numel() == 0:
        return end, columns
    table, (in_chunk, chunks) = timetable(solver, way.precision), lanes(d)
    shape = Shape(models, states * chunks, in_chunk)
    plan = _plan("flow_jacobian", network, device, shape, Way(way.precision, "streamed"))
    job = Job(network, plan, table, shape)
    groups, block_d = _groups(job, device), max(16, next_power_of_two(d))
    with torch.cuda.device_of(start):
        jacobian_kernel[(models * groups,)](
            Rows(start.contiguous(), None, _contiguous(cond), table.on(device)),
            end,
            columns,
            _weights(network),
            _scratch(job, models * groups, block_d, device),
            num_states=states,
            rows_per_cond=1 if cond is None else models * states // cond[..., 0].numel(),
            num_evals=table.num_evals,
            groups_per_model=groups,
            low=table.low,
            high=table.high,
            NET=net,
            PLAN=plan,
            LANES=in_chunk,
            CHUNKS=chunks,
            BLOCK_D=block_d,
            PRECISION=table.dot_precision,
            CLIP=table.clip,
            num_warps=plan.num_warps,
        )
    return end, columns


def _plan(op: str, network: EncodedNetwork, device: torch.device, shape: Shape, way: Way) -> FlowPlan:
    precision, net = way.precision, network.architecture
    # cuBLAS multiplies float32 as PyTorch's global setting says, which belongs to the caller and is not changed here
    library = precision in HALF or (precision == "highest") == (float32_products() == "highest")
    if way.implementation == "gemm" and not library:
        raise RuntimeError(
            f"{op}: implementation='gemm' with precision={precision!r} needs torch.set_float32_matmul_precision("
            f"{precision!r}), got {float32_products()!r}"
        )
    problem = Problem(
        gpu_of(device), multiprocessors(device), net.widths, net.action_dim, net.normalised,
        "half" if precision in HALF else precision, shape.states, shape.num_samples, shape.models,
    )  # fmt: skip
    try:
        return flow_plan(problem, way.implementation, library)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turn autocast off, because the dtypes are settled."""
    if torch.amp.is_autocast_available(device.type):  # the meta device has none
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _launch(
    job: Job,
    rows: Rows,
    *,
    end: Tensor | None = None,
    path: Tensor | None = None,
    fisher: Fisher | None = None,
    normalize: bool = False,
    use_x: bool = False,
) -> None:
    (models, states, num_samples), plan, net = job.shape, job.plan, job.network.architecture
    weights, cond = _weights(job.network), rows.cond
    weight = weights.weights[0]
    device = weight.device
    block_k, block_d = next_power_of_two(num_samples), max(16, next_power_of_two(net.action_dim))
    groups = _groups(job, device)
    with torch.cuda.device_of(weight):
        flow_kernel[(models * groups * plan.split,)](
            rows,
            end,
            path,
            fisher,
            weights,
            _scratch(job, models * groups, block_d, device),
            num_states=states,
            num_models=models,
            rows_per_cond=1 if cond is None else models * states * num_samples // cond[..., 0].numel(),
            num_evals=job.table.num_evals,
            groups_per_model=groups,
            low=job.table.low,
            high=job.table.high,
            NET=net,
            PLAN=plan,
            K=num_samples,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            PRECISION=job.table.dot_precision,
            CLIP=job.table.clip,
            FISHER=fisher is not None,
            NORMALIZE=normalize,
            USE_X=use_x,
            num_warps=plan.num_warps,
            **({"launch_cooperative_grid": True} if plan.split > 1 else {}),  # programs of a group wait for one another
        )


def _groups(job: Job, device: torch.device) -> int:
    """Groups of programs for each model: one for each block of rows, up to as many as the GPU runs at once."""
    (models, states, num_samples), plan = job.shape, job.plan
    blocks = -(-states * next_power_of_two(num_samples) // plan.rows)
    at_once = multiprocessors(device) * (1 if plan.split > 1 else PROGRAMS_PER_SM)
    return max(1, min(blocks, at_once // (plan.split * models)))


def _weights(network: EncodedNetwork) -> Weights:
    weights, biases, scales, shifts = (tuple(map(_contiguous, network.parameters[i::4])) for i in range(4))
    return Weights(weights, biases, scales[:-1], shifts[:-1])  # type: ignore[arg-type]


def _scratch(job: Job, groups: int, block_d: int, device: torch.device) -> Scratch:
    """Scratch memory for this many groups of programs, over all models."""
    net, plan = job.network.architecture, job.plan
    programs = groups * plan.split

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    grouped = plan.split > 1
    return Scratch(
        share=empty(programs, plan.rows, net.widths[0]),
        hidden=empty(groups, 2, plan.rows, net.widest, dtype=job.table.hidden_dtype),
        wide=empty(programs, plan.rows, net.widest) if net.normalised else None,
        partial=empty(groups, plan.split, plan.rows, block_d) if grouped else None,
        counter=torch.zeros(groups, dtype=torch.int32, device=device) if grouped else None,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
