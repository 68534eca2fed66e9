"""The kernels as compiled for sm_80 and sm_90, run on the CPU by an emulator of PTX: values, races and stray accesses.

Values are judged by the plain maths in float64, with what tensor cores round; ``tests/ptx/races.py`` says what a race
is. Every run fails on one.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fdkernels_ref

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from benchmarks.static_report import FlowCase, flow_cases
from fdkernels.kernels import launch, networks
from tests.ptx.flows import Problem, draw
from tests.ptx.run import RaceError, emulate, without

BARS = {"highest": 1e-5, "high": 1e-3, "bf16": 1e-2}
DTYPES = {"highest": torch.float32, "high": torch.float32, "bf16": torch.bfloat16}


def relative(out: Tensor, truth: Tensor) -> float:
    assert out.shape == truth.shape
    assert not out.isnan().any(), "NaN: unwritten output, or something was read before it was written"
    return ((out.double() - truth).norm() / truth.norm()).item()


def cases(architecture: str, shipped: bool) -> list:
    """Those of the static report, once for each way to compile them."""
    found = [case for dtype in (torch.float32, torch.bfloat16) for case in flow_cases(architecture, dtype)]
    chosen = [case for case in found if case.shipped == shipped and case._replace(rows=case.rows // 4) not in found]
    return [pytest.param(architecture, case, id=name(architecture, case)) for case in chosen]


def name(architecture: str, case: FlowCase) -> str:
    return "-".join(map(str, (architecture, *case[:5], f"d{case.d}", case.norm, f"models{case.models}")))


SHIPPED = cases("sm_80", True) + cases("sm_90", True)


@pytest.mark.parametrize(("architecture", "case"), SHIPPED)
def test_shipped_entries(architecture: str, case: FlowCase) -> None:
    """From noise to the penalty and its gradient, at the size and with the tiles that are shipped."""
    problem = Problem(case, states=5, dtype=DTYPES[case.precision])
    penalty, gradient, _ = problem.fisher(architecture)
    _, true_penalty, true_gradient = problem.truth()
    print(name(architecture, case), relative(penalty, true_penalty), relative(gradient, true_gradient))
    assert relative(penalty, true_penalty) < 2 * BARS[case.precision]  # quadratic in the scores
    assert relative(gradient, true_gradient) < 2 * BARS[case.precision]
