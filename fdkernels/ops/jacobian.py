"""flow_jacobian: start (models, rows, d), cond (models, conds, c) -> end (models, rows, d), Jacobian (..., d, d).

The Jacobian ∂end_i/∂start_j is that of the end before clipping, in float32. It has no PyTorch body: where the kernels
do not serve, the public function differentiates the plain solver.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.layers import EncodedNetwork
from fdkernels.ops.integrate import prepare, rows_of
from fdkernels.ops.models import fold, unfold
from fdkernels.ops.register import register
from fdkernels.records import Way
from fdkernels.solvers import Solver


class Call(NamedTuple):
    start: Tensor
    cond: Tensor | None
    network: EncodedNetwork
    solver: Solver
    """It clips at the end or never."""
    way: Way


def fused_jacobian(
    network: EncodedNetwork, x0: Tensor, cond: Tensor | None, solver: Solver, way: Way
) -> tuple[Tensor, Tensor]:
    """The ends (..., d), and their Jacobians (..., d, d) before clipping, in float32."""
    prepare(solver, x0.device)
    start = x0.detach().reshape(1, -1, x0.shape[-1])
    end, jacobian = _operator(Call(start, rows_of(cond, x0.shape[:-1]), network, solver, way))
    return end.reshape(x0.shape), jacobian.reshape(*x0.shape, x0.shape[-1])


def _body(call: Call) -> tuple[Tensor, Tensor]:
    from fdkernels.kernels.flow import launch

    return launch.jacobian(*call)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    start = call.start
    return start.new_empty(start.shape), start.new_empty((*start.shape, start.shape[-1]), dtype=torch.float32)


def _vmap(info: Any, dims: Call, call: Call) -> Any:
    outputs = _operator(fold(info.batch_size, call, dims))
    return tuple(zip(*(unfold(out, info.batch_size, dims) for out in outputs)))


_operator = register("flow_jacobian", Call, "(Tensor, Tensor)", _body, _fake, _vmap)
