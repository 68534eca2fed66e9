"""The kernels compiled for sm_80 and sm_90 run on the emulator: values, races and stray accesses.

Values are judged by the plain maths in float64, with room for the rounding of tensor cores. ``tools/ptx/races.py``
defines races, and any race fails a run.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fdkernels_ref

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from fdkernels.kernels.flow import stationary
from fdkernels.kernels.penalty import launch as penalty_launch
from fdkernels.kernels.score import launch as score_launch
from fdkernels.records import Affine, PenaltyRule
from tools.cases import FlowCase, flow_cases
from tools.ptx.flows import Problem, draw
from tools.ptx.run import RaceError, emulate, without

BARS = {"highest": 1e-5, "high": 1e-3, "bf16": 1e-2}
DTYPES = {"highest": torch.float32, "high": torch.float32, "bf16": torch.bfloat16}


def relative(out: Tensor, truth: Tensor) -> float:
    assert out.shape == truth.shape
    assert not out.isnan().any(), "NaN: unwritten output, or something was read before it was written"
    return ((out.double() - truth).norm() / truth.norm()).item()


def cases(architecture: str, dtype: torch.dtype, shipped: bool) -> list:
    """The cases of the static report, so that kernels are compiled once for both; one case per kernel."""
    found = [case for case in flow_cases(architecture, dtype) if case.shipped == shipped]
    if architecture == "sm_90" and dtype == torch.bfloat16 and shipped:
        found = [case for case in found if case.rows != 256]  # it has the same entry as 64 rows
    shipped_for_hopper = shipped and architecture == "sm_90"
    marks = [] if shipped_for_hopper else [pytest.mark.long("other tiles, and other products, of the same kernels")]
    return [pytest.param(architecture, case, id=name(architecture, case), marks=marks) for case in found]


def name(architecture: str, case: FlowCase) -> str:
    """A test id that tells the case from the others."""
    usual = FlowCase(*case[:3])
    rest = (f"{field}={value}" for field, value, same in zip(case._fields, case, usual) if value != same)
    return "-".join((architecture, *map(str, case[:3]), *(part for part in rest if part != "shipped=True")))


BOTH = (torch.float32, torch.bfloat16)
SHIPPED = [case for architecture in ("sm_80", "sm_90") for dtype in BOTH for case in cases(architecture, dtype, True)]
# Together these use each feature of a network once.
OTHERS = cases("sm_80", torch.float32, False)[1::2] + cases("sm_90", torch.bfloat16, False)[::2]
OTHERS += cases("sm_90", torch.bfloat16, False)[5:6]


@pytest.mark.parametrize(("architecture", "case"), SHIPPED + OTHERS)
def test_from_noise_to_penalty(architecture: str, case: FlowCase) -> None:
    """At the shipped sizes with the shipped tiles, and in other cases that the kernels support."""
    case = case._replace(models=min(case.models, 2))
    problem = Problem(case, states=3, dtype=DTYPES[case.precision], steps=1)
    penalty, gradient, _ = problem.fisher(architecture)
    _, true_penalty, true_gradient = problem.truth()
    errors = relative(penalty, true_penalty), relative(gradient, true_gradient)
    print("{}: penalty {:.1e}, gradient {:.1e}".format(name(architecture, case), *errors))
    assert max(errors) < 2 * BARS[case.precision]  # quadratic in the scores


FEW = {"streamed": 0, "stationary": 2}  # processors for a single group of programs
SMALL = {
    "streamed": FlowCase("streamed", "bf16", width=128, depth=3, cond_dim=5),
    "stationary": FlowCase("stationary", "bf16", rows=64, width=64, depth=3, cond_dim=5),
}


def small(implementation: str, states: int = 4, **changes: object) -> Problem:
    torch.manual_seed(0)
    return Problem(SMALL[implementation]._replace(**changes), states, torch.bfloat16)


@pytest.mark.parametrize(("implementation", "times"), [("streamed", False), ("stationary", True)])
def test_blocks_of_rows_in_turns(implementation: str, times: bool) -> None:
    """One group of programs processes several blocks of rows; the order of turns does not change the result."""
    problem = small(implementation, states=10, times=times)
    path, true_penalty, _ = problem.truth()
    outs = [problem.integrate("sm_90", processors=FEW[implementation], seed=seed) for seed in range(3)]
    assert relative(outs[0], path if times else path[-1]) < BARS["bf16"]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert relative(problem.fisher("sm_90", processors=FEW[implementation])[0], true_penalty) < 2 * BARS["bf16"]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("sm_80", {"d": 17, "depth": 2}),
        ("sm_90", {"norm": "before", "models": 2}),
        pytest.param("sm_90", {"rows": 4096, "width": 256}, marks=pytest.mark.long("other products")),
    ],
    ids=str,
)
def test_jacobian(architecture: str, changes: dict[str, object]) -> None:
    """One program processes all blocks of rows; with d = 17, a state's tangents may lie in two of them."""
    problem = small("streamed", states=3, num_samples=1, **changes)
    end, jacobian = problem.jacobian(architecture, processors=0)
    true_end, true_jacobian = problem.true_jacobian()
    assert relative(end, true_end) < BARS["bf16"]
    assert relative(jacobian, true_jacobian) < BARS["bf16"]
    assert relative(jacobian.mT, true_jacobian) > 10 * BARS["bf16"]


@pytest.mark.parametrize("depth", [2, 4])
def test_two_buffers_are_enough(depth: int) -> None:
    problem = small("stationary", states=10, depth=depth)
    assert relative(problem.integrate("sm_90", processors=2), problem.truth()[0][-1]) < BARS["bf16"]


def fails(problem: Problem, edit: Callable[[str], str]) -> bool:
    """Whether the run reports a race or programs wait for ever."""
    try:
        problem.integrate("sm_90", edit=edit, processors=FEW[problem.case.implementation])
    except (RaceError, TimeoutError):
        return True
    return False


def ptx_of(problem: Problem) -> str:
    seen: list[str] = []
    problem.integrate("sm_90", edit=lambda ptx: seen.append(ptx) or ptx)
    return seen[0]


@pytest.mark.parametrize("implementation", SMALL)
def test_a_barrier_too_few_is_a_race(implementation: str) -> None:
    """Every barrier of the small kernel is removed in turn.

    A removal may only go unnoticed if another barrier is on the same path: the compiler adds its own beside ours, one
    more at the turn of each buffer, and some that only other paths through the code need.
    """
    problem = small(implementation, states=5)
    ptx = ptx_of(problem)
    lines = ptx.splitlines()
    barriers = [i for i, line in enumerate(lines) if re.search(r"\bbar\.sync", line)]
    noticed = [
        fails(problem, lambda ptx, which=which: without(ptx, r"\bbar\.sync", which)) for which in range(len(barriers))
    ]
    print([barriers[i] + 1 for i, found in enumerate(noticed) if not found])
    assert sum(noticed) >= 0.75 * len(noticed)
    source, first = inspect.getsourcelines(stationary.meet.fn)
    meeting = [f"stationary.py:{first + i}:" for i, line in enumerate(source) if "tl.debug_barrier" in line]
    for at, found in zip(barriers, noticed):
        place = next(line for line in lines[at::-1] if ".loc" in line)
        assert found or not any(of_meet in place for of_meet in meeting), place


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"atom\.global\.gpu\.release", "atom.global.gpu.relaxed"),
        (r"ld\.global\.gpu\.acquire", "ld.global.gpu.relaxed"),
        (r"(?<=cp\.async\.wait_group)\s+0", " 9"),
    ],
)
def test_weaker_waiting_is_a_race(pattern: str, instead: str) -> None:
    problem = small("streamed" if "wait_group" in pattern else "stationary")
    found = re.search(pattern, ptx_of(problem))
    assert found
    assert fails(problem, lambda ptx: re.sub(pattern, instead, ptx))
    assert fails(problem, lambda ptx: re.sub(pattern, instead, ptx, count=1))


@pytest.mark.parametrize(
    ("architecture", "dtype", "num_samples", "d"),
    [
        *(("sm_80", torch.float32, 4, 6), ("sm_80", torch.bfloat16, 5, 7)),
        *(("sm_90", torch.float32, 5, 7), ("sm_90", torch.bfloat16, 4, 6)),
    ],
)
def test_penalty_and_score(architecture: str, dtype: torch.dtype, num_samples: int, d: int) -> None:
    rows, bar = 11, 1e-5 if dtype == torch.float32 else 1e-2
    displacement, score, x = (draw(rows, *shape, dtype=dtype) for shape in ((d,), (num_samples, d), (num_samples, d)))
    leaf, scores = displacement.double().requires_grad_(), score.double().requires_grad_()
    truth = fdkernels_ref.fisher_penalty(leaf, scores)
    upstream = draw(rows)
    gradients = torch.autograd.grad(truth, (leaf, scores), upstream.double())

    rule = PenaltyRule(1e-3, True, 1e-6)
    penalty, gradient, trace = emulate(architecture, penalty_launch.penalty, displacement, score, rule, True, True)
    assert relative(penalty, truth.detach()) < bar
    assert relative(gradient * upstream[:, None], gradients[0]) < bar
    args = (upstream, displacement, score, penalty, trace, rule)
    assert relative(emulate(architecture, penalty_launch.score_gradient, *args), gradients[1]) < bar

    pairs = draw(rows, num_samples, 2)
    made = pairs[..., :1].double() * score.double() + pairs[..., 1:].double() * x.double()
    affine = Affine(pairs, 1.0, 0.0, True)
    assert relative(emulate(architecture, score_launch.score, score, x, affine), made) < bar
    args = (displacement, score, x, affine, rule, True)
    penalty, _ = emulate(architecture, penalty_launch.velocity_penalty, *args)
    assert relative(penalty, fdkernels_ref.fisher_penalty(displacement.double(), made)) < bar
