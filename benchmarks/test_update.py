"""A whole update of an agent: sampling, draws, all losses, backward, clipping, Adam, target network.

    pytest benchmarks --benchmark-only -k update

"eager" is PyTorch as people write it today (``peers/eager_agent.py``); "JAX" is written like the published agents
(``peers/jax_agent.py`` says what it computes besides). The gate is in ``updates.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness import ON_GPU, Entry, Race, precision
from benchmarks.updates import CASES, JUDGED_UPDATES, Case, Contestant, Eager, Jax, Ours, judge


def make(variant: str, case: Case, table: str) -> Contestant:
    if variant == "eager":
        return Eager(case)
    if variant == "eager, torch.compile":
        return Eager(case, mode="default")
    if variant == "eager, torch.compile with CUDA graphs":
        return Eager(case, mode="reduce-overhead")
    if variant == "JAX":
        return Jax(case, table)
    return Ours(
        case,
        captured="captured" in variant,
        compiled="compile" in variant,
        flow_precision="bf16" if "bf16" in variant else None,
    )


def cases() -> list[Any]:
    found = []
    for case in CASES:
        for table in ("tf32", "fp32") if ON_GPU else ("fp32",):
            names = ["eager", "eager, torch.compile", "JAX", "ours", "ours, bf16 flow", "ours, torch.compile"]
            if ON_GPU:
                names += ["eager, torch.compile with CUDA graphs", "ours, captured", "ours, captured, bf16 flow"]
            for variant in names:
                marks = []
                if "compile" in variant and (case is not CASES[0] or (table == "fp32" and ON_GPU)):
                    marks = [pytest.mark.long("compiling takes minutes, and another size has it")]
                if variant == "ours, torch.compile" and not ON_GPU:
                    marks = [pytest.mark.long("compiling takes minutes")]
                found.append(pytest.param(variant, case, table, id=f"{variant}-{case}-{table}", marks=marks))
    return found


@pytest.mark.parametrize(("variant", "case", "table"), cases())
def test_update(race: Race, variant: str, case: Case, table: str) -> None:
    entry = Entry(
        op=f"{case.agent} update",
        variant=variant,
        sizes=case.sizes,
        detail=table if ON_GPU else "",
        precision="bf16" if "bf16" in variant else table,
        baseline_precision=table,
        calls=10 if ON_GPU else 1,
        flops=case.flops(),
        torch_memory=variant != "JAX",
    )
    with precision(table):
        contestant, baseline = make(variant, case, table), Eager(case)

        def judge_first_updates(i: int, outputs: None) -> float:
            for _ in range(JUDGED_UPDATES - 1):
                contestant.update()
            return judge(entry, case, contestant.outcome())

        race(
            entry, lambda i: contestant.update(), lambda i: baseline.update(), judge_first_updates, stateful=True
        )  # fmt: skip
