"""Tuning a tiny network: the next process uses the plan that was found fastest."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fdkernels import tune
from fdkernels.kernels.flow import launch
from fdkernels.kernels.tuning import plans, table
from tests.kernels.device import DEVICE, INTERPRETED

SMALL = ["--cond-dim", "0", "--action-dim", "3", "--hidden", "24", "24", "--rows", "5"]
PRECISION = "high" if INTERPRETED else "bf16"  # bfloat16 is wrong in the interpreter
CANDIDATES = [
    {"implementation": "stationary", "rows": 16, "block_n": 0, "block_inputs": 32, "num_stages": 1, "num_warps": 4},
    {"implementation": "streamed", "rows": 16, "block_n": 64, "block_inputs": 32, "num_stages": 3, "num_warps": 4},
    {"implementation": "streamed", "rows": 32, "block_n": 32, "block_inputs": 16, "num_stages": 2, "num_warps": 4},
    {"implementation": "gemm", "rows": 16, "block_n": 16, "block_inputs": 16, "num_stages": 2, "num_warps": 4},
]


@pytest.mark.parametrize("fastest", [1, 2, 3])
def test_the_fastest_is_used_from_then_on(
    fastest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tune, "FLOWS", CANDIDATES)
    args = tune.parse([*SMALL, "--precision", PRECISION, "highest"])
    args.device = DEVICE
    gpu, chosen = table.gpu_of(DEVICE), []
    flow_plan = plans.flow_plan

    def noted(*args: Any) -> plans.FlowPlan:
        chosen.append(flow_plan(*args))
        return chosen[-1]

    def timer(run: Callable[[], object]) -> float:
        """Run the candidate; only the plan that is meant to be the fastest gets a short time."""
        run()
        return 1.0 if [getattr(chosen[-1], name) for name in CANDIDATES[fastest]] == fitted else 2.0

    fitted = [min(value, 32) if name == "block_n" else value for name, value in CANDIDATES[fastest].items()]
    monkeypatch.setattr(launch, "flow_plan", noted)
    before, setting = dict(table.TABLE), torch.get_float32_matmul_precision()
    try:
        found = [tune.tune(workload, gpu, timer) for workload in tune.flow_workloads(args)]
    finally:
        torch.set_float32_matmul_precision(setting)
    assert before == table.TABLE
    assert len(chosen) == 2 * 3 * 2  # checked, then timed; stationary groups do not support this width
    assert len(set(chosen)) == 3
    assert "stationary" in (printed := capsys.readouterr().out)
    assert "serves two or more hidden layers of one width, a power of two" in printed

    file = tmp_path / "configs.json"
    table.write(file, "this GPU", {"flow": [entry for entry in found if entry]})
    monkeypatch.setattr(table, "TABLE", table.read(file))
    named = table.Gpu("this GPU", "unknown family")
    for precision in (tune.PRECISIONS[PRECISION], "highest"):
        problem = plans.Problem(named, 8, (24, 24), 3, False, precision, states=7, num_samples=1, models=1)
        plan = flow_plan.__wrapped__(problem, None, True)
        assert plan.implementation == CANDIDATES[fastest]["implementation"]
        assert plan.rows == CANDIDATES[fastest]["rows"]


def test_nothing_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "FLOWS", CANDIDATES[:1])
    args = tune.parse([*SMALL, "--precision", PRECISION])
    args.device = DEVICE
    (workload,) = tune.flow_workloads(args)
    gpu = table.gpu_of(DEVICE)
    assert tune.tune(workload, gpu, lambda run: run() or 0.0) is None
    assert tune.measure(workload, CANDIDATES[0], gpu, lambda run: run() or 0.0)[0] == math.inf


def test_the_fastest_may_not_be_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(tune, "FLOWS", CANDIDATES[1:3])
    args = tune.parse([*SMALL, "--precision", PRECISION])
    args.device = DEVICE
    (workload,) = tune.flow_workloads(args)

    def run(candidate: table.Entry) -> Any:
        action = workload.run(candidate)
        return action + 0.01 if candidate == CANDIDATES[1] else action

    times = iter([1.0, 2.0])
    found = tune.tune(workload._replace(run=run), table.gpu_of(DEVICE), lambda run: next(times))
    assert found is not None
    assert {name: found[name] for name in CANDIDATES[2]} == CANDIDATES[2]
    assert "wrong: off by" in capsys.readouterr().out
    assert next(times) == 2.0, "the wrong one was timed"


def compiles_one_of_four(args: None, precision: str, index: int) -> None:
    """The second crashes at once, the third hangs."""
    tune._begun[index] = True
    if index == 1:
        os._exit(1)
    time.sleep(600 if index == 2 else 0)


def test_what_hangs_or_crashes_while_it_compiles_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tune, "PATIENCE", 2.0)
    monkeypatch.setattr(tune, "FLOWS", CANDIDATES)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    left_out = tune.Compiler(compiles_one_of_four).compile(None, "high")  # type: ignore[arg-type]
    assert left_out == {1: "left out: ends its process, or one that was compiled beside it does", 2: "left out: hangs"}
    tried: list[table.Entry] = []
    workload = tune.Workload("flow", {}, "", tried.append, CANDIDATES)
    assert tune.tune(workload, table.gpu_of(DEVICE), lambda run: 1.0, left_out) == CANDIDATES[0]
    assert tried == [CANDIDATES[0], CANDIDATES[3]]
    assert "left out: hangs" in capsys.readouterr().out


def fails(*args: object) -> None:
    raise AssertionError("ours")


def test_an_error_of_ours_is_not_a_candidates() -> None:
    with pytest.raises(AssertionError, match="ours"):
        tune.Compiler(fails).compile(None, "high")  # type: ignore[arg-type]
    tune.Compiler().stop()
