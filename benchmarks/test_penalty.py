"""The Fisher penalty of given scores: the matrix form, the same with torch.compile, and ours.

    pytest benchmarks --benchmark-only -k penalty

On CUDA all calls are issued from Python in one table, and captured in a CUDA graph in another. Small sizes are bound by
launches, large ones by memory. Their limit is the time to read and write once what each pass must: forward δ, the
scores and the penalty, and for the backward pass at least d numbers a row, which are the gradient but for a factor; and
backward these, the upstream gradient and the gradient of δ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fdkernels
import fdkernels_ref
from benchmarks.harness import ON_GPU, TIMINGS, Entry, Outputs, Race, copies_beyond_cache, gate, normal, rotating

SIZES = [(256, 4, 6), (256, 8, 8), (4096, 4, 17)]
SIZES += [(2**20, 4, 6), (2**18, 5, 17), (2**19, 4, 8), (2**20, 8, 8)] if ON_GPU else [(2**17, 4, 6)]
JUDGED = slice(4096)  # rows; enough, because all are alike
Penalty = Callable[[Tensor, Tensor], Tensor]


def eager(displacement: Tensor, score: Tensor) -> Tensor:
    """The matrix form in plain PyTorch: the reference's operations without the overhead of einops."""
    d = displacement.shape[-1]
    fisher = (score.unsqueeze(-1) * score.unsqueeze(-2)).mean(-3)
    fisher = fisher + 1e-3 * torch.eye(d, dtype=score.dtype, device=score.device)
    fisher = fisher / fisher.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-6)[..., None, None]
    delta = displacement.unsqueeze(-1)
    return (delta.mT @ fisher @ delta).squeeze(-1).squeeze(-1) / d


def contestant(variant: str) -> Penalty:
    """The penalty (rows,) of δ (rows, d) and scores (rows, K, d)."""
    name, _, compiled = variant.partition(", ")
    function = {"eager": eager, "ours": fdkernels.fisher_penalty}[name]
    return torch.compile(function, dynamic=False) if compiled else function


def step(penalty: Penalty, backward: bool, displacement: Tensor, score: Tensor, upstream: Tensor) -> Outputs:
    if not backward:
        with torch.no_grad():
            return {"penalty": penalty(displacement, score)}
    out = penalty(displacement, score)
    (gradient,) = torch.autograd.grad(out, displacement, upstream)
    return {"penalty": out.detach(), "gradient": gradient}


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("variant", ["eager", "eager, torch.compile", "ours", "ours, torch.compile"])
def test_penalty(race: Race, variant: str, size: tuple[int, int, int], backward: bool, timing: str) -> None:
    rows, num_samples, d = size
    numbers = rows * (d * (num_samples + 1) + 1 + backward * (3 * d + 1))
    entry = Entry(
        op="fisher_penalty",
        variant=variant,
        sizes={"rows": rows, "K": num_samples, "d": d},
        detail=f"{'forward and backward' if backward else 'forward'}{', GPU time' if timing == 'graph' else ''}",
        baseline_timing=timing,
        timing=timing,
        calls=20 if rows <= 4096 else 4,
        flops=rows * (4 * num_samples * d + 3 * d) * (1 + backward),
        bytes=4 * numbers,
    )
    inputs = [
        (
            normal(rows, d, seed=3 * i, requires_grad=True),
            normal(rows, num_samples, d, seed=3 * i + 1),
            normal(rows, seed=3 * i + 2),
        )
        for i in range(copies_beyond_cache(entry.bytes) if rows > 4096 else 2)
    ]

    def judge(i: int, outputs: Outputs) -> float:
        truth = step(fdkernels_ref.fisher_penalty, backward, *judged_rows(*inputs[i]))
        return gate(entry, {name: out[JUDGED] for name, out in outputs.items()}, truth)

    run, baseline = (
        rotating(functools.partial(step, contestant(name), backward), inputs) for name in (variant, "eager")
    )
    race(entry, run, baseline, judge, inputs=len(inputs))


def judged_rows(displacement: Tensor, score: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first rows of all inputs, in float64."""
    leaf = displacement.detach()[JUDGED].double().requires_grad_()
    return leaf, score[JUDGED].double(), upstream[JUDGED].double()
