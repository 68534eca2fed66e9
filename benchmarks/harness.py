"""Shared by all suites: the gate that every contestant must pass before it is timed, and the race that times it.

A *contestant* is a function of the call's number i, so that it can cycle through several inputs. In every round the
baseline of its table is timed first and the contestant right after it, so that a slower machine slows both. The
speed-up is the median of these paired ratios, with their quartiles. The baseline also races against itself, and the
spread around its 1.0 is the noise of the machine.

Calls are timed by wall time until the device is done; captured CUDA graphs by the time between two events on the
device. The results hold both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from fdkernels.cpu.processor import multiplies
from fdkernels.torch_private import own_cublas_workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TIMINGS = ("eager", "graph") if ON_GPU else ("eager",)
"""How calls are issued: one by one from Python, or by replaying a captured CUDA graph."""

TOLERANCES = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
"""Largest relative error ‖out − ref64‖/‖ref64‖ of a contestant that is timed, by precision of its products."""

LEAST_ROUNDS, MOST_ROUNDS = 10, 200

Outputs = Mapping[str, Tensor]
Call = Callable[[int], Any]


class WrongResult(AssertionError):
    """A contestant's result differs from the reference."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table."""

    op: str
    variant: str
    sizes: Mapping[str, int]
    detail: str = ""
    """Distinguishes this table from others with the same op and sizes."""
    timing: str = "eager"
    precision: str = "fp32"
    calls: int = 1
    """Calls per round, issued back to back."""
    flops: float | None = None
    """Floating-point operations that the task needs per call, whatever the contestant does."""
    bytes: float | None = None
    """Bytes that must be read and written once per call."""
    baseline_variant: str = "eager"
    baseline_timing: str = "eager"
    baseline_precision: str = "fp32"
    torch_memory: bool = True
    """Whether the contestant's memory comes from PyTorch."""

    @property
    def group(self) -> str:
        """Title of the table."""
        sizes = " ".join(f"{name}={value:,}" for name, value in self.sizes.items())
        per = f"{self.calls} calls" if self.calls > 1 else ""
        return ", ".join(filter(None, (f"{self.op} {sizes}", self.detail, per)))

    @property
    def label(self) -> str:
        """Name of the line in its table."""
        return label(self.variant, self.timing, self.precision)

    @property
    def baseline(self) -> str:
        """Name of the line that it is compared with."""
        return label(self.baseline_variant, self.baseline_timing, self.baseline_precision)


def label(variant: str, timing: str, precision: str) -> str:
    words = [variant]
    if timing == "graph":
        words.append("CUDA graph")
    if precision != "fp32" and precision not in variant:
        words.append(precision)
    return ", ".join(words)


# -- inputs --------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int, requires_grad: bool = False) -> Tensor:
    """Standard normal numbers in float32 on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).requires_grad_(requires_grad)


def rotating(function: Callable[..., Any], inputs: Sequence[tuple]) -> Call:
    """A call that cycles through the inputs: call i gets input i mod their number."""
    return lambda i: function(*inputs[i % len(inputs)])


def copies_beyond_cache(bytes_per_call: float) -> int:
    """Number of inputs, from 2 to 8, that ensures that none is still in a cache when its turn comes again."""
    return int(min(8, max(2, 2 * last_level_cache() // bytes_per_call + 1)))


@functools.cache
def last_level_cache() -> int:
    """Size of the last-level cache in bytes."""
    if ON_GPU:
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sizes = [
        int(file.read_text().strip().rstrip("K")) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    return 1024 * max(sizes, default=32 * 1024)


# -- the gate ------------------------------------------------------------------------------------------------------


def relative_error(out: Tensor, truth: Tensor) -> float:
    return ((out.detach().double() - truth.double()).norm() / truth.double().norm()).item()


def gate(
    entry: Entry, outputs: Outputs, truth: Outputs, tolerances: Mapping[str, float] | float | None = None
) -> float:
    """The largest relative error over all outputs in ``truth``. Raises if one exceeds its tolerance or is NaN."""
    worst = 0.0
    for name, right in truth.items():
        tolerance = TOLERANCES[entry.precision] if tolerances is None else tolerances
        if not isinstance(tolerance, float):
            tolerance = tolerance[name]
        if outputs[name].shape != right.shape:
            raise WrongResult(f"{entry.label}: {name} has shape {tuple(outputs[name].shape)}, not {tuple(right.shape)}")
        error = relative_error(outputs[name], right)
        if not error <= tolerance:
            raise WrongResult(f"{entry.label}: {name} is off by {error:.1e}, allowed {tolerance:.0e}: not worth timing")
        worst = max(worst, error)
    return worst


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Matrix products in fp32, TF32 or, by autocast, bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- the race ------------------------------------------------------------------------------------------------------


class Race:
    """Times a contestant against the baseline of its table, and records the row.

    Args:
        benchmark: pytest-benchmark's fixture.
        seconds: time to spend on the rounds of one contestant.
        keep: called with the row of results.
    """

    def __init__(self, benchmark: Any, seconds: float, keep: Callable[[dict[str, Any]], None]) -> None:
        self.benchmark, self.seconds, self.keep = benchmark, seconds, keep

    def __call__(
        self,
        entry: Entry,
        contestant: Call,
        baseline: Call,
        judge: Callable[[int, Any], float],
        *,
        inputs: int = 1,
        stateful: bool = False,
    ) -> None:
        """Check the contestant, then time it.

        Args:
            contestant, baseline: functions of the call's number.
            judge: takes the call's number and the result; returns the relative error or raises WrongResult.
            inputs: number of different inputs; the result for each is judged.
            stateful: calls change the results of later calls, so only the fresh contestant can be judged.
        """
        started = time.perf_counter()
        first = contestant(0)
        synchronize()
        first_call_seconds = time.perf_counter() - started
        errors = [judge(0, first)]
        errors += [judge(i, contestant(i)) for i in range(1, 1 if stateful else inputs)]
        del first

        run = round_of(contestant, entry.calls, graph=entry.timing == "graph")
        run_baseline = round_of(baseline, entry.calls, graph=entry.baseline_timing == "graph")
        memory, method = peak_memory(lambda: contestant(0), torch_memory=entry.torch_memory)
        for _ in range(2):
            run_baseline()
            run()
        pace = timed(run_baseline)[0] + timed(run)[0]
        rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, self.seconds / pace)))

        baselines: list[tuple[float, float]] = []  # wall seconds and seconds between events
        own: list[tuple[float, float]] = []  # the same for the contestant
        last: list[Any] = [None]

        def before() -> None:
            baselines.append(timed(run_baseline)[:2])

        def target() -> None:
            wall, device, last[0] = timed(run)
            own.append((wall, device))

        self.benchmark.group = entry.group
        self.benchmark.name = entry.label
        self.benchmark.pedantic(target, setup=before, rounds=rounds, warmup_rounds=1)
        if not stateful:
            errors.append(judge((entry.calls - 1) % inputs, last[0]))
        if self.benchmark.disabled:  # by pytest-benchmark's switch: check only
            return
        on_device = entry.timing == "graph"
        own_walls, own_events = np.array(own[-rounds:]).T / entry.calls
        own_seconds = own_events if on_device else own_walls
        baseline_walls, baseline_events = np.array(baselines[-rounds:]).T / entry.calls
        baseline_seconds = baseline_events if entry.baseline_timing == "graph" else baseline_walls
        row = dataclasses.asdict(entry) | {
            "group": entry.group,
            "label": entry.label,
            "baseline": entry.baseline,
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_units": half_products(),
            "rounds": rounds,
            "clock": "CUDA events" if on_device else "wall",
            "seconds": quartiles(own_seconds),
            "wall_seconds": quartiles(own_walls),
            "speedup": quartiles(baseline_seconds / own_seconds),
            "first_call_seconds": first_call_seconds,
            "peak_memory_bytes": memory,
            "peak_memory_method": method,
            "relative_error": max(errors),
        }
        self.benchmark.extra_info.update(row)
        self.keep(row)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def round_of(call: Call, calls: int, *, graph: bool) -> Callable[[], Any]:
    """The calls of a round, one after the other or captured in a graph; returns the result of the last one."""
    if not graph:

        def issue() -> Any:
            for i in range(calls):
                out = call(i)
            return out

        return issue
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(3, calls)):
            call(i % calls)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with own_cublas_workspace(), torch.cuda.graph(captured):
        for i in range(calls):
            out = call(i)

    def replay() -> Any:
        captured.replay()
        return out

    return replay


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds until the device is done, seconds between events on it (wall seconds on a CPU), and the result."""
    synchronize()
    if not ON_GPU:
        started = time.perf_counter()
        out = run()
        wall = time.perf_counter() - started
        return wall, wall, out
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = time.perf_counter()
    begin.record()
    out = run()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - started, begin.elapsed_time(end) / 1e3, out


def quartiles(samples: np.ndarray) -> dict[str, float]:
    q25, median, q75 = np.percentile(samples, (25, 50, 75))
    return {"q25": float(q25), "median": float(median), "q75": float(q75)}


def peak_memory(run: Callable[[], Any], *, torch_memory: bool) -> tuple[int | None, str]:
    """Peak bytes of one call beyond those held before it, and how they were measured."""
    if ON_GPU and torch_memory:
        synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - held, "CUDA allocator"
    if torch_memory:
        return allocations_at_peak(run), "PyTorch's CPU allocator, traced by its profiler"
    if ON_GPU:
        return None, "not measured: another framework's memory on the GPU"
    # This is a lower bound: pages that an earlier call left with the process are not counted.
    Path("/proc/self/clear_refs").write_text("5")
    held = resident_peak()
    run()
    return resident_peak() - held, "growth of the process's resident set (a lower bound)"


def resident_peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def allocations_at_peak(run: Callable[[], Any]) -> int:
    """The peak of PyTorch's allocations and frees, summed in the order of the profiler's trace."""
    gc.collect()  # what earlier calls left would count as freed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate((change for _, change in sorted(changes)), initial=0))


# -- the machine ---------------------------------------------------------------------------------------------------


@functools.cache
def device_name() -> str:
    """The GPU; or the processor, with the instruction set and number of threads that PyTorch uses."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"


def clocks() -> dict[str, Any]:
    """The machine's current clocks and load."""
    state: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    if ON_GPU:
        fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            values = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
            state |= dict(zip(fields.split(","), map(str.strip, values.split(","))))
    else:
        speeds = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
        state["cpu_mhz"] = [round(float(speed)) for speed in speeds]
    return state


@functools.cache
def roofs() -> dict[str, float]:
    """Bytes per second of a copy beyond all caches, and operations per second of a large product in each precision."""
    elements = 2**28 if ON_GPU else 2**24
    source = torch.empty(elements, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy_bytes": 8 * elements / _seconds("target.copy_(source)", source=source, target=target)}
    del source, target
    width = 8192 if ON_GPU else 2048
    half = half_products()
    for name in ("fp32", "tf32", "bf16") if ON_GPU else ("fp32", "bf16") if half else ("fp32",):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(width, width, device=DEVICE, dtype=dtype) for _ in range(2))
        with precision("tf32" if name == "tf32" else "fp32"):
            found[f"{name}_flops"] = 2 * width**3 / _seconds("a @ b", a=a, b=b)
    if not half:
        found["bf16_flops"] = found["fp32_flops"]  # operands are rounded and multiplied in float32
    return found


def half_products() -> bool:
    """Whether the device has units for bfloat16 products."""
    return ON_GPU or multiplies(torch.bfloat16)


def _seconds(statement: str, **names: Tensor) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)  # a roof is what the machine can do undisturbed
