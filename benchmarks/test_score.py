"""From the velocity to the score: the formula as written, the same with torch.compile, and ours.

pytest benchmarks --benchmark-only -k score
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels
import fdkernels_ref
from benchmarks.harness import ON_GPU, TIMINGS, Entry, Outputs, Race, copies_beyond_cache, gate, normal, rotating

T = 0.95


def eager(velocity: Tensor, x: Tensor) -> Tensor:
    return (T * velocity - x) / max(1 - T, 1e-6)


CONTESTANTS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: eager,
    "eager, torch.compile": lambda: torch.compile(eager, dynamic=False),
    "ours": lambda: functools.partial(fdkernels.velocity_to_score, t=T),
}


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("rows", [256, 2**21 if ON_GPU else 2**16])
@pytest.mark.parametrize("variant", CONTESTANTS)
def test_score(race: Race, variant: str, rows: int, timing: str) -> None:
    num_samples, d = 4, 6
    numbers = rows * num_samples * d
    small = rows <= 4096
    entry = Entry(
        op="velocity_to_score",
        variant=variant,
        sizes={"rows": rows, "K": num_samples, "d": d},
        detail="GPU time" if timing == "graph" else "",
        timing=timing,
        baseline_timing=timing,
        calls=20 if small else 4,
        flops=3 * numbers,
        bytes=12 * numbers,
    )
    copies = 2 if small else copies_beyond_cache(12 * numbers)
    inputs = [
        (normal(rows, num_samples, d, seed=2 * i), normal(rows, num_samples, d, seed=2 * i + 1)) for i in range(copies)
    ]

    def judge(i: int, outputs: Outputs) -> float:
        velocity, x = (tensor.double() for tensor in inputs[i])
        return gate(entry, outputs, {"score": fdkernels_ref.velocity_to_score(velocity, x, T)})

    def call(function: Any) -> Any:
        def score(velocity: Tensor, x: Tensor) -> Outputs:
            with torch.no_grad():
                return {"score": function(velocity, x)}

        return rotating(score, inputs)

    race(entry, call(CONTESTANTS[variant]()), call(eager), judge, inputs=copies)
