"""Time the kernels' configurations on the GPU at hand, and use the best from
then on.

Writes the winners to the user's table, $FDKERNELS_CONFIGS or
fdkernels/configs.json in $XDG_CACHE_HOME or ~/.cache, under the GPU's name;
processes started afterwards use it. Without it they use the shipped table, or
heuristics for GPUs that are not in it.

Each of the flow's candidates takes seconds to compile. One process per core
compiles them, one precision at a time, while the precision before is timed.
A candidate whose actions are wrong, or that hangs or crashes its process while
it is compiled, is left out. Each winner is written as soon as it is known, so a
run may be interrupted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

import fdkernels
from fdkernels import backend
from fdkernels.kernels.penalty import launch as penalty_launch
from fdkernels.kernels.score import launch as score_launch
from fdkernels.kernels.tuning import table
from fdkernels.kernels.tuning.table import Entry, Gpu
from fdkernels.kernels.tuning.tiles import next_power_of_two
from fdkernels.records import Affine, PenaltyRule

Timer: TypeAlias = Callable[[Callable[[], object]], float]
PROGRAM = "python -m fdkernels.tune"
ENDING = f"""\
examples:

  {PROGRAM}
      the published network, 4 x 512
  {PROGRAM} --only flow --hidden 256 256 256 --cond-dim 29 --rows 256
      another network
  {PROGRAM} --dry-run
      only print

exit codes: 0 done, 1 failed, 2 refused, 130 stopped
"""
SIZES = [(4, 6), (4, 17), (16, 60), (64, 256), (256, 1024)]  # (K, d)
PRECISIONS = {"bf16": "half", "high": "high", "highest": "highest"}  # option -> name in the table
TOLERANCES = {"bf16": 5e-2, "high": 1e-2, "highest": 1e-4}
"""Largest relative error of the way that a flow's actions have come. Beyond it, a candidate is wrong, not imprecise."""
PATIENCE = 60.0
"""Seconds in which at least one candidate must be compiled. If none was, those that have begun hang."""

TILES: list[Entry] = [
    {"tile_bytes": tile_bytes, "num_warps": num_warps}
    for tile_bytes, num_warps in itertools.product((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8))
]


def _flows(implementation: str, **choices: Sequence[int]) -> list[Entry]:
    """All combinations of the choices."""
    combinations = itertools.product(*choices.values())
    return [{"implementation": implementation} | dict(zip(choices, chosen)) for chosen in combinations]


ROWS = (16, 32, 64, 128)
FLOWS: list[Entry] = [  # stationary goes last: its programs wait for each other, and so could wait for ever
    *_flows("streamed", rows=ROWS, block_n=(64, 128), block_inputs=(32, 64), num_stages=(3, 4), num_warps=[8]),
    *_flows("gemm", rows=ROWS[:3], block_n=(64, 128), block_inputs=[64], num_stages=(2, 3), num_warps=[4]),
    *_flows("stationary", rows=ROWS, block_n=[0], block_inputs=(128, 256), num_stages=[1], num_warps=(4, 8)),
]


class Workload(NamedTuple):
    kernel: str
    problem: Entry
    """The fields of an entry that describe its problem."""
    label: str
    run: Callable[[Entry], object]
    """Called with a candidate while the table holds it."""
    candidates: list[Entry]
    problem_with: Callable[[Any], str] = lambda result: ""
    """Says what is wrong with a candidate's result."""


def _always(run: Callable[[], object]) -> Callable[[Entry], object]:
    return lambda _: run()


def penalty_workloads(args: argparse.Namespace) -> Iterator[Workload]:
    """Use float32 tensors that are too large for any cache."""
    rule = PenaltyRule(1e-3, True, 1e-6)
    for num_samples, d in SIZES:
        rows = math.ceil(args.elements / (num_samples * d))
        score = torch.randn(rows, num_samples, d, device=args.device)
        displacement, row = torch.randn(rows, d, device=args.device), torch.rand(rows, device=args.device)
        problem = {"row_bytes": 4 * next_power_of_two(num_samples) * next_power_of_two(d)}
        label = f"K={num_samples} d={d}"

        forward = functools.partial(penalty_launch.penalty, displacement, score, rule, True, False)
        backward = functools.partial(penalty_launch.score_gradient, row, displacement, score, row, row, rule)
        yield Workload("penalty", problem, label, _always(forward), TILES)
        yield Workload("penalty_score_gradient", problem, label, _always(backward), TILES)


def score_workloads(args: argparse.Namespace) -> Iterator[Workload]:
    flat = torch.randn(args.elements, 1, device=args.device)
    affine = Affine(None, 2.0, 1.0, True)
    run = _always(lambda: score_launch.score(flat, flat, affine))
    yield Workload("score", {"row_bytes": 1}, "flat", run, TILES)


def flow_workloads(args: argparse.Namespace) -> Iterator[Workload]:
    """Ten Euler steps."""
    velocity = fdkernels.VelocityMLP(args.cond_dim, args.action_dim, args.hidden).to(args.device)
    for precision, rows in itertools.product(args.precision, args.rows):
        x0 = torch.randn(rows, args.action_dim, device=args.device)
        cond = torch.randn(rows, args.cond_dim, device=args.device) if args.cond_dim else None
        integrate = functools.partial(fdkernels.integrate_flow, velocity, x0, cond, precision=precision)

        def run(candidate: Entry, integrate: Any = integrate, precision: str = precision) -> object:
            if precision != "bf16":  # cuBLAS follows this setting
                torch.set_float32_matmul_precision(precision)
            return integrate(implementation=candidate["implementation"])

        @functools.cache
        def way(x0: Tensor = x0, cond: Tensor | None = cond) -> tuple[Tensor, Tensor]:
            """From where to where the float64 network brings the actions."""
            exact = copy.deepcopy(velocity).double()
            start, condition = x0.double(), cond if cond is None else cond.double()
            return start.clamp(-1, 1), fdkernels.integrate_flow(exact, start, condition, backend="torch")

        def problem_with(action: Tensor, way: Any = way, largest: float = TOLERANCES[precision]) -> str:
            start, end = way()
            error = ((action - end).norm() / (end - start).norm()).item()
            return "" if error <= largest else f"wrong: off by {error:.1e} of the way"

        problem = {"precision": PRECISIONS[precision], "problem_rows": rows, "width": max(args.hidden)}
        yield Workload("flow", problem, f"{precision} rows={rows}", run, FLOWS, problem_with)


WORKLOADS = {"penalty": penalty_workloads, "score": score_workloads, "flow": flow_workloads}


def measure(workload: Workload, candidate: Entry, gpu: Gpu, timer: Timer) -> tuple[float, str]:
    """The timer's milliseconds with this candidate, or infinity and the reason why it does not fit or serve."""
    with table.only(gpu, workload.kernel, workload.problem | candidate):
        try:
            if problem := workload.problem_with(workload.run(candidate)):
                return math.inf, problem
            return timer(lambda: workload.run(candidate)), ""
        except (TritonError, ValueError, RuntimeError) as error:
            return math.inf, (str(error) or type(error).__name__).splitlines()[0]


def tune(workload: Workload, gpu: Gpu, timer: Timer, left_out: Mapping[int, str] | None = None) -> Entry | None:
    """The fastest candidate, as an entry. All are printed.

    Args:
        left_out: why some candidates, by their place in the list, are not even tried.
    """
    timings = []
    for i, candidate in enumerate(workload.candidates):
        why_not = (left_out or {}).get(i, "")
        milliseconds, why_not = (math.inf, why_not) if why_not else measure(workload, candidate, gpu, timer)
        _print(workload, candidate, f"{milliseconds:.4f} ms" if not why_not else "-", why_not)
        timings.append((milliseconds, i))
    milliseconds, i = min(timings)
    if math.isinf(milliseconds):
        return None
    _print(workload, workload.candidates[i], f"{milliseconds:.4f} ms", "<- the fastest")
    return workload.problem | workload.candidates[i]


def _print(workload: Workload, candidate: Entry, result: str, note: str) -> None:
    settings = " ".join(f"{name}={value}" for name, value in candidate.items())
    print(f"{workload.kernel:24}{workload.label:16}{result:>12}  {settings}  {note}", flush=True)


# -- compiling ---------------------------------------------------------------------------------------------------------


def _compile(args: argparse.Namespace, precision: str, index: int) -> None:
    """Compile a candidate into Triton's cache, in a separate process. One number of rows serves for all."""
    _begun[index] = True
    args.rows, args.precision = args.rows[:1], [precision]
    for workload in flow_workloads(args):
        measure(workload._replace(problem_with=lambda result: ""), FLOWS[index], table.gpu_of(args.device), _once)


_begun: Any = None
"""In a process that compiles: which candidates any of them has begun with."""


def _start(begun: Any) -> None:
    global _begun
    _begun = begun
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the main one ends the others


class Compiler:
    """Compiles all candidates of a precision in as many processes as there are cores."""

    def __init__(self, job: Callable[..., None] = _compile) -> None:
        self._job, self._stopped = job, False

    def stop(self) -> None:
        self._stopped = True
        self._end()

    def compile(self, args: argparse.Namespace, precision: str) -> dict[int, str]:
        """The candidates that hang or crash, and so are not to be tried in this process, and the reason."""
        found: dict[int, str] = {}
        waiting = set(range(len(FLOWS)))
        spawn = multiprocessing.get_context("spawn")
        while waiting and not self._stopped:
            begun = spawn.Array("b", len(FLOWS), lock=False)
            pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn, _start, (begun,))
            jobs = {pool.submit(self._job, args, precision, i): i for i in sorted(waiting)}
            pending = set(jobs)
            problem = "hangs"
            while pending:
                done, pending = concurrent.futures.wait(pending, PATIENCE, concurrent.futures.FIRST_COMPLETED)
                crashed = [job for job in done if isinstance(job.exception(), BrokenProcessPool)]
                for job in done.difference(crashed):
                    job.result()  # raises errors that no candidate may cause
                    waiting.remove(jobs[job])
                if crashed:
                    problem = "ends its process, or one that was compiled beside it does"
                if crashed or (not done and any(begun[jobs[job]] for job in pending)):
                    break
            pool.shutdown(wait=False, cancel_futures=True)
            self._end()
            culprits = {i for i in waiting if begun[i]}
            if waiting and not culprits and not self._stopped:
                raise RuntimeError("the processes that should compile end before they begin")
            found |= dict.fromkeys(culprits, f"left out: {problem}")
            waiting -= culprits
        return found

    @staticmethod
    def _end() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()


def _once(run: Callable[[], object]) -> float:
    run()
    return 0.0


def _wall_time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _graph_time(run: Callable[[], object]) -> float:
    """Milliseconds on the GPU in a graph, without the host's work or the copies around a recorded solve.

    The least of ten measurements, because other candidates may be compiled, and run once, beside it.
    """
    return triton.testing.do_bench_cudagraph(run, rep=5, return_mode="min")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, epilog=ENDING, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to time")
    what.add_argument(
        "--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="some of the kernels (default: all)"
    )
    elements = "scores to weigh, in numbers of four bytes (default: 2^27, half a GiB, larger than any cache)"
    what.add_argument("--elements", type=int, default=2**27, metavar="N", help=elements)
    flow = parser.add_argument_group("the flow's network, and what it integrates")
    for name, of, default in (("cond", "condition", 17), ("action", "action", 6)):
        text = f"numbers in a row of the {of} (default: {default})"
        flow.add_argument(f"--{name}-dim", type=int, default=default, metavar="N", help=text)
    flow.add_argument(
        "--hidden", type=int, nargs="+", default=[512] * 4, metavar="N", help="hidden widths (default: 512 512 512 512)"
    )
    rows = [16, 256, 512, 1536, 4096, 16384]
    text = f"rows to integrate at once (default: {' '.join(map(str, rows))})"
    flow.add_argument("--rows", type=int, nargs="+", default=rows, metavar="N", help=text)
    text = f"of matrix products, some of {', '.join(PRECISIONS)} (default: all)"
    flow.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="NAME", help=text)
    written = parser.add_argument_group("what to write")
    written.add_argument("--dry-run", action="store_true", help="print the timings and write nothing")
    written.add_argument(
        "--ship", action="store_true", help="write the library's own table, for the GPU's whole family"
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if torch.cuda.is_available():
        args.device, timer = torch.device("cuda", torch.cuda.current_device()), _graph_time
    elif backend.INTERPRETER and args.dry_run:  # shows that everything runs, not how fast
        args.device, timer = torch.device("cpu"), _wall_time
    else:
        print("error: no CUDA GPU here to measure; nothing was written", file=sys.stderr)
        raise SystemExit(2)
    gpu = table.gpu_of(args.device)
    source = f"timed on {gpu.name}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}"
    file, key = (table.SHIPPED_FILE, gpu.family) if args.ship else (table.user_file(), gpu.name)
    compiler, thread, wrote = Compiler(), concurrent.futures.ThreadPoolExecutor(1), False
    try:
        compiling = {
            PRECISIONS[precision]: thread.submit(compiler.compile, args, precision)
            for precision in args.precision
            if "flow" in args.only
        }
        for workload in itertools.chain.from_iterable(WORKLOADS[name](args) for name in args.only):
            compiled = compiling.get(workload.problem.get("precision", ""))
            best = tune(workload, gpu, timer, compiled.result() if compiled else None)
            if best and not args.dry_run:
                table.write(file, key, {workload.kernel: [best | {"source": source}]})
                wrote = True
    except KeyboardInterrupt:
        print("stopped; the winners so far are kept", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        compiler.stop()
    if not args.dry_run:
        if not wrote:
            print("error: no candidate serves; nothing was written", file=sys.stderr)
            raise SystemExit(1)
        print(f"wrote {file}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops it as Ctrl-C does
    main()
