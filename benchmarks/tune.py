"""Time the kernels' configurations on the GPU at hand, and write the best into the table that ships with the library.

python benchmarks/tune.py               # prints each candidate, then writes fdkernels/kernels/configs.json
python benchmarks/tune.py --only flow   # of one kernel; the other entries stay
python benchmarks/tune.py --dry-run     # only prints

The flow's candidates take seconds each to compile: that is done beforehand, in as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

import fdkernels
from fdkernels.kernels import configs, launch

SIZES = [(4, 6), (4, 17), (16, 60), (64, 256), (256, 1024)]  # (K, d); rows fill half a gigabyte
ELEMENTS = 2**27
FLOW_ROWS = (16, 256, 512, 1536, 4096, 16384)
PRECISIONS = {"bf16": "half", "high": "high", "highest": "highest"}  # and what the table calls it
Entry = dict[str, Any]

TILES: list[Entry] = [
    {"tile_bytes": tile_bytes, "num_warps": num_warps}
    for tile_bytes, num_warps in itertools.product((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8))
]
FLOWS: list[Entry] = [
    *(
        {"implementation": "stationary", "rows": rows, "block_n": 0, "block_inputs": inputs, "num_stages": 1}
        | {"num_warps": num_warps}
        for rows, inputs, num_warps in itertools.product((16, 32, 64, 128), (128, 256), (4, 8))
    ),
    *(
        {"implementation": "streamed", "rows": rows, "block_n": block_n, "block_inputs": inputs, "num_stages": stages}
        | {"num_warps": 8}
        for rows, block_n, inputs, stages in itertools.product((16, 32, 64, 128), (64, 128), (32, 64), (3, 4))
    ),
    {"implementation": "gemm", "rows": 0, "block_n": 0, "block_inputs": 0, "num_stages": 1, "num_warps": 4},
]


class Workload(NamedTuple):
    kernel: str
    problem: Entry
    """What of an entry says what it is for."""
    label: str
    run: Callable[[], object]
    candidates: list[Entry]


def penalty_workloads() -> list[Workload]:
    """float32 tensors that no cache holds."""
    made: list[Workload] = []
    for num_samples, d in SIZES:
        rows = ELEMENTS // (num_samples * d)
        score = torch.randn(rows, num_samples, d, device="cuda")
        displacement, row = torch.randn(rows, d, device="cuda"), torch.rand(rows, device="cuda")
        problem = {"row_bytes": 4 * configs.next_power_of_two(num_samples) * configs.next_power_of_two(d)}
        label = f"K={num_samples} d={d}"

        def penalty(score: torch.Tensor = score, displacement: torch.Tensor = displacement) -> object:
            return launch.penalty(displacement, score, 1e-3, True, 1e-6, True, False)

        def gradient(
            score: torch.Tensor = score, displacement: torch.Tensor = displacement, row: torch.Tensor = row
        ) -> object:
            return launch.penalty_score_gradient(row, displacement, score, row, row, True, 1e-6)

        made.append(Workload("penalty", problem, label, penalty, TILES))
        made.append(Workload("penalty_score_gradient", problem, label, gradient, TILES))
    return made


def score_workloads() -> list[Workload]:
    flat = torch.randn(ELEMENTS, 1, device="cuda")
    return [Workload("score", {"row_bytes": 1}, "flat", lambda: launch.score(flat, flat, None, 2.0, 1.0, True), TILES)]


def flow_workloads() -> list[Workload]:
    """The published network, ten Euler steps."""
    velocity = fdkernels.VelocityMLP(17, 6).cuda()
    made: list[Workload] = []
    for (precision, name), rows in itertools.product(PRECISIONS.items(), FLOW_ROWS):
        x0, cond = torch.randn(rows, 6, device="cuda"), torch.randn(rows, 17, device="cuda")

        def run(x0: torch.Tensor = x0, cond: torch.Tensor = cond, precision: Any = precision) -> object:
            if precision != "bf16":  # PyTorch's products follow it
                torch.set_float32_matmul_precision(precision)
            return fdkernels.integrate_flow(velocity, x0, cond, precision=precision)

        problem = {"precision": name, "problem_rows": rows, "width": 512}
        made.append(Workload("flow", problem, f"{precision} rows={rows}", run, FLOWS))
    return made


WORKLOADS = {"penalty": penalty_workloads, "score": score_workloads, "flow": flow_workloads}


def measure(workload: Workload, candidate: Entry, compile_only: bool = False) -> float:
    """Median milliseconds on the GPU with this candidate; infinite where it does not fit."""
    family = configs.gpu_family(torch.device("cuda", torch.cuda.current_device()))
    for cached in (configs.penalty_tile, configs.score_block, configs.flow_plan):
        cached.cache_clear()
    with mock.patch.dict(configs.TABLE, {family: {workload.kernel: [workload.problem | candidate]}}):
        try:
            workload.run()
            return 0.0 if compile_only else triton.testing.do_bench_cudagraph(workload.run, return_mode="median")
        except (triton.runtime.errors.OutOfResources, ValueError, RuntimeError):  # too large, or refused
            return float("inf")


def compile_candidate(kernel: str, index: int) -> None:
    """In a process of its own; what it compiles stays in Triton's cache. One size will do: the code is the same."""
    for workload in WORKLOADS[kernel]()[1 :: len(FLOW_ROWS)]:
        measure(workload, workload.candidates[index], compile_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="the kernels to time")
    parser.add_argument("--dry-run", action="store_true", help="print the timings and write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tune.py: no GPU here; the shipped table stays as it is\n")
    device = torch.device("cuda", torch.cuda.current_device())
    source = f"timed on {torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}"
    if "flow" in args.only:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
            list(pool.map(compile_candidate, itertools.repeat("flow"), range(len(FLOWS))))
    found: dict[str, list[Entry]] = {}
    for workload in itertools.chain.from_iterable(WORKLOADS[name]() for name in args.only):
        timings = sorted((measure(workload, candidate), i) for i, candidate in enumerate(workload.candidates))
        for milliseconds, i in timings:
            settings = " ".join(f"{name}={value}" for name, value in workload.candidates[i].items())
            print(f"{workload.kernel:24}{workload.label:16}{milliseconds:.4f} ms  {settings}", flush=True)
        best = workload.candidates[timings[0][1]]
        found.setdefault(workload.kernel, []).append(workload.problem | best | {"source": source})
    if not args.dry_run:
        family = configs.gpu_family(device)
        table = configs.TABLE | {family: configs.TABLE.get(family, {}) | found}
        configs.TABLE_FILE.write_text(json.dumps(table, indent=2) + "\n")
        print(f"wrote {configs.TABLE_FILE}; `python benchmarks/static_report.py` checks the new entries for spills")


if __name__ == "__main__":
    main()
