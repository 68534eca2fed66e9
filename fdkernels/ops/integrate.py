"""integrate_flow: start (models, rows, d), cond (models, conds, c) -> end (models, rows, d), or all states.

It has no PyTorch body: where the kernels do not serve, ``solvers.integrate`` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.layers import EncodedNetwork
from fdkernels.ops.models import fold, unfold
from fdkernels.ops.register import register
from fdkernels.records import Way
from fdkernels.solvers import Solver
from fdkernels.torch_private import constant_when_compiled


class Call(NamedTuple):
    start: Tensor
    cond: Tensor | None
    network: EncodedNetwork
    solver: Solver
    want_path: bool
    way: Way


def fused_integrate(
    network: EncodedNetwork, x0: Tensor, cond: Tensor | None, solver: Solver, return_path: bool, way: Way
) -> Tensor:
    """The ends (..., d), or the states at all times (S + 1, ..., d)."""
    prepare(solver, x0.device)
    start = x0.detach().reshape(1, -1, x0.shape[-1])
    out = _operator(Call(start, rows_of(cond, x0.shape[:-1]), network, solver, return_path, way))
    return out.reshape(len(solver.times), *x0.shape) if return_path else out.reshape(x0.shape)


def prepare(solver: Solver, device: torch.device) -> None:
    """Put on the device what a compiled graph must find there."""
    if torch.compiler.is_compiling():
        _put_on_device(tuple(solver.times), solver.method, device)


@constant_when_compiled
def _put_on_device(times: tuple[float, ...], method: str, device: torch.device) -> None:
    from fdkernels.kernels.flow.timetable import put_on_device

    put_on_device(times, method, device)


def rows_of(cond: Tensor | None, lead: torch.Size) -> Tensor | None:
    """cond as (1, rows, c). Each row serves equally many neighbouring rows of the flow; else cond is expanded."""
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


def _body(call: Call) -> Tensor:
    from fdkernels.kernels.flow import launch

    return launch.integrate(*call)


def _fake(call: Call) -> Tensor:
    start = call.start
    return start.new_empty((len(call.solver.times), *start.shape) if call.want_path else start.shape)


def _vmap(info: Any, dims: Call, call: Call) -> tuple[Tensor, int | None]:
    out = _operator(fold(info.batch_size, call, dims))
    return unfold(out, info.batch_size, dims, first=int(call.want_path))


_operator = register("integrate_flow", Call, "Tensor", _body, _fake, _vmap)
