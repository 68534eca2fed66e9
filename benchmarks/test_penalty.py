"""The Fisher penalty: the matrix form, torch.compile of it, and ours, side by side.

    pytest benchmarks --benchmark-only -k penalty

Each variant is checked against float64 first; a wrong one is not timed. On a GPU, "eager" is wall time with a
synchronisation, "graph" the replay of a captured graph of twenty calls, and ``extra_info`` holds the bandwidth next to
the rate of a copy measured in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import fdkernels
import fdkernels_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRAPH_CALLS = 20
SIZES = [(256, 4, 6), (4096, 4, 17)] + [(2**20, 4, 6), (2**18, 5, 17), (2**19, 4, 8)] * (DEVICE.type == "cuda")
Step = Callable[[], tuple[Tensor, ...]]

VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrix": fdkernels_ref.fisher_penalty,
    "matrix-compiled": torch.compile(fdkernels_ref.fisher_penalty, dynamic=False),
    "ours": fdkernels.fisher_penalty,
    "ours-compiled": torch.compile(fdkernels.fisher_penalty, dynamic=False),
}


@functools.cache
def copy_rate() -> float:
    """GB/s read and written by a copy that no cache holds."""
    source = torch.empty(2**28 if DEVICE.type == "cuda" else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    measured = Timer("target.copy_(source)", globals={"source": source, "target": target}).blocked_autorange()
    return 2 * source.numel() * source.element_size() / measured.median / 1e9


def step(variant: str, backward: bool, displacement: Tensor, score: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    if not backward:
        with torch.no_grad():
            return (VARIANTS[variant](displacement, score),)
    penalty = VARIANTS[variant](displacement, score)
    return penalty.detach(), *torch.autograd.grad(penalty, displacement, upstream)


def graph_of(run: Step) -> Step:
    """Twenty calls captured once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            out = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("timing", ["eager", "graph"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_penalty(benchmark: Any, variant: str, size: tuple[int, int, int], backward: bool, timing: str) -> None:
    rows, num_samples, d = size
    benchmark.group = f"penalty {rows}x{num_samples}x{d} {'forward+backward' if backward else 'forward'} {timing}"
    displacement = torch.randn(rows, d, device=DEVICE, requires_grad=True)
    score = torch.randn(rows, num_samples, d, device=DEVICE)
    upstream = torch.randn(rows, device=DEVICE)
    if variant.startswith("matrix") and rows * d * d > 2**28:
        pytest.skip("the matrices would take gigabytes")
    torch.compiler.reset()  # one compilation a size: no recompilation limit is reached
    run = functools.partial(step, variant, backward, displacement, score, upstream)

    judged = slice(4096)  # rows, which are all alike
    leaf = displacement[judged].detach().double().requires_grad_()
    truth = fdkernels_ref.fisher_penalty(leaf, score[judged].double())
    gradient = torch.autograd.grad(truth, leaf, upstream[judged].double())[0]
    for name, out, right in zip(("penalty", "gradient"), run(), (truth, gradient)):
        error = ((out[judged].double() - right).norm() / right.norm()).item()
        assert error < 1e-5, f"{variant}: {name} is off by {error:.1e}, not worth timing"

    timed = graph_of(run) if timing == "graph" else run

    def call() -> None:
        timed()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=200, warmup_rounds=20)
    calls = GRAPH_CALLS if timing == "graph" else 1
    seconds = benchmark.stats.stats.median / calls
    # δ, s and the penalty; backward reads δ, s and the upstream gradient, and writes the one to δ.
    elements = rows * (d * (num_samples + 1) + 1) + backward * rows * (d * (num_samples + 2) + 1)
    benchmark.extra_info.update(
        op="fisher_penalty",
        variant=variant,
        rows=rows,
        num_samples=num_samples,
        d=d,
        dtype="float32",
        direction="forward+backward" if backward else "forward",
        timing=timing,
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        torch=torch.__version__,
        microseconds_per_call=seconds * 1e6,
        gigabytes_per_second=4 * elements / seconds / 1e9,
        copy_gigabytes_per_second=copy_rate(),
    )
