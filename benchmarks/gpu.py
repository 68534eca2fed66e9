"""Everything that needs a CUDA GPU, in four parts with limited time: tests,
tuning, benchmarks, training.

A part is a sequence of commands. A command that has used up its time is
interrupted, and the next one begins; it also gets the time that earlier ones
left over. Results go into the folder of --out ($OUT, or runs/gpu/out) as they
appear, and all output into `log.txt` there; the last lines printed give the
outcome of each command. `tune` writes the library's own table of
implementations and tiles. All later commands use it, also those of later calls,
for which it is kept in runs/gpu.

Installed packages are used, whatever their version. If the machine lacks some
and cannot download them, --wheels names a folder of their wheels
(`make gpu-wheels` fills one). Without git, BENCH_COMMIT gives the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

PROGRAM = "python benchmarks/gpu.py"
ENDING = f"""\
examples:

  make gpu
      all four parts, half an hour at most
  {PROGRAM} check tune
      two parts, 9.5 minutes; bench and train take as long each
  {PROGRAM} train --seconds 400
      no longer than that; a second call continues from the last checkpoint
  {PROGRAM} --dry-run
      the same commands on a CPU and in small, to see whether they work

exit codes: 0 done, 1 a command failed, 2 refused, 130 stopped; see
docs/commands/exit-codes.md
"""
ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "gpu"
"""Kept between calls, so that one call can continue another's work."""
GRACE = 45.0
"""Seconds between the interrupt and the kill, in which to finish an evaluation and write a checkpoint."""
LEAST = 2.0
"""Seconds that must be left for a command to begin."""
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
LARGE = re.compile("checkpoints|policy[.]safetensors")
TABLE = Path("fdkernels/kernels/tuning/shipped.json")
HANGS = ("-o", "faulthandler_timeout=90", "-o", "faulthandler_exit_on_timeout=true")
"""A test that hangs says where it is, and with pytest 9 ends its process, so that the others go on."""
WORKERS = str(min(12, os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    command: tuple[str, ...]
    """Arguments of Python."""
    small: tuple[str, ...] = ()
    """Arguments that a dry run adds."""
    interpreted: bool = False
    """Whether a dry run replaces the GPU by Triton's interpreter."""
    keep: tuple[str, ...] = ()
    """Files and folders to copy to the results, folders without their weights.

    In these fields {out} stands for the folder of results, {work} for `WORK` or its counterpart in a dry run.
    """
    shown: bool = False
    """Whether its output is printed, and not only kept."""

    def arguments(self, folders: dict[str, Path], dry: bool) -> list[str]:
        return [argument.format_map(folders) for argument in (*self.command, *(self.small if dry else ()))]


def kernel_tests() -> tuple[str, ...]:
    """The files of the kernels' tests. The one that takes longest to compile goes first."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"), key=lambda file: file.name != "test_flow.py")
    return tuple(str(file.relative_to(ROOT)) for file in files if file.name != "test_sanitizer.py")


def bench(suite: str, seconds: float, small: str, *, name: str = "", chosen: str = "") -> Step:
    options = ("--benchmark-only", "--benchmark-columns=median,iqr,min,rounds", "--results={out}/bench.json")
    command = (*PYTEST, *options, "--seconds=0.5", f"benchmarks/test_{suite}.py", *(("-k", chosen) if chosen else ()))
    return Step(name or suite, seconds, command, ("--seconds=0", "-k", small))


def train(name: str, seconds: float, *options: str, small: tuple[str, ...], keep: tuple[str, ...]) -> Step:
    command = ("train/run.py", "--env", "halfcheetah-medium-expert", "--out", f"{{work}}/{name}")
    tiny = ("--device=cpu", "--actor-hidden=16", "16", "--critic-hidden=16", "--batch-size=32", "--flow-steps=2")
    short = ("--env=hopper-medium", "--dataset-size=5", "--eval-episodes=1", "--log-every=5")
    return Step(name, seconds, (*command, *options), (*short, *tiny, *small), keep=keep)


FEW_UPDATES = (
    *("--preset", "full", "--steps", "200", "--eval-every", "1000", "--eval-episodes", "2", "--overwrite"),
    *("--dataset-size", "10"),
)
WARM_UPS = (
    *("--flow-warmup", "20", "--critic-warmup", "20", "--steps", "20", "--eval-episodes", "1", "--overwrite"),
    *("--dataset-size", "10"),
)
TRACE = ("{work}/profile/trace.json", "{work}/profile/trace.txt")
SEEDS = (
    *("--preset", "full", "--num-seeds", "8", "--steps", "1_000_000"),
    *("--eval-every", "100_000", "--eval-episodes", "10", "--resume"),
)
TUNED_FLOW = ("--precision", "high", "bf16", "highest", "--rows", "256", "1536", "16384")
TINY_FLOW = ("--hidden", "16", "16", "--cond-dim", "3", "--rows", "5", "--precision", "high")

PARTS: dict[str, tuple[Step, ...]] = {
    "check": (
        Step(
            "kernels",
            150,
            (*PYTEST, "-n", WORKERS, "--dist", "worksteal", *HANGS, *kernel_tests(), "-k", "not thousand"),
            ("-k", "4x6 and penalty and triton and float32"),
            interpreted=True,
        ),
        Step("sanitizer", 90, (*PYTEST, "-n", "4", "tests/kernels/test_sanitizer.py"), interpreted=True),
        Step(
            "races",
            40,
            (*PYTEST, "-n", "4", *HANGS, "tests/kernels/test_flow.py", "-k", "thousand"),
            ("-k", "dawdle"),
            interpreted=True,
        ),
        train("quick", 30, "--preset", "quick", *WARM_UPS, small=(), keep=()),
        train("profile", 45, "--profile", *FEW_UPDATES, small=("--steps=20",), keep=TRACE),
    ),
    "tune": (
        Step(
            "tiles",
            45,
            ("-m", "fdkernels.tune", "--ship", "--only", "penalty", "score"),
            ("--dry-run", "--elements", "4096", "--only", "score"),
            interpreted=True,
            keep=(str(TABLE),),
        ),
        Step(
            "flow",
            170,
            # training's precision goes first: entries that are not reached stay as they are in the table
            ("-m", "fdkernels.tune", "--ship", "--only", "flow", *TUNED_FLOW),
            ("--dry-run", *TINY_FLOW),
            interpreted=True,
            keep=(str(TABLE),),
        ),
    ),
    "bench": (
        bench("update", 105, "ours-fql", chosen="not JAX"),
        bench("update", 55, "JAX-fql", name="jax", chosen="JAX"),  # in a process of its own, for it holds on to memory
        bench("flow", 110, "ours-1x"),
        bench("penalty", 55, "ours-256x4x6"),
        bench("decorator", 55, "ours-256x4"),
        bench("pullback", 50, "ours-256x2"),
        bench("seeds", 50, "alone"),
        bench("acting", 35, "ours-fql"),
        bench("score", 25, "ours-256"),
        bench("sampling", 25, "ours-256"),
        Step("bars", 5, ("benchmarks/bars.py", "{out}/bench.json"), shown=True),
    ),
    "train": (
        train(
            "train",
            570,
            *SEEDS,
            small=("--num-seeds=2", "--steps=10", "--eval-every=5", "--checkpoint-every=5"),
            keep=("{work}/train",),
        ),
    ),
}


@dataclasses.dataclass
class Outcome:
    part: str
    step: str
    outcome: str
    """passed, failed, skipped, cut short, stopped, or no time."""
    seconds: float
    returncode: int


def environment(step: Step, folders: dict[str, Path], dry: bool, site: Path | None) -> dict[str, str]:
    paths = [str(site)] * (site is not None) + [str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = dict(os.environ) | {"OUT": str(folders["out"]), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found.setdefault("FDKERNELS_CONFIGS", str(folders["work"] / TABLE.name))
    if dry:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # it times nothing, and may share the CPU
        found |= {"TRITON_INTERPRET": "1"} if step.interpreted else {}
    return found


def run(arguments: Sequence[str], seconds: float, environment: dict[str, str], log: TextIO) -> tuple[str, int]:
    """Run Python for at most ``seconds``; returns the outcome and the exit code."""
    log.write(f"\n==== python {' '.join(arguments)}\n")
    log.flush()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its workers end with it
    )
    grace = min(GRACE, seconds / 4)
    cut_short = True
    try:
        cut_short = not has_ended(process, seconds - grace)
    finally:  # also if this script is interrupted, because its commands get no signal of their own
        if cut_short:
            os.killpg(process.pid, signal.SIGINT)
            has_ended(process, grace)
            with contextlib.suppress(ProcessLookupError):  # workers may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ("cut short" if cut_short else "failed" if process.returncode else "passed"), process.returncode


def has_ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return False
    return True


def take_along(source: Path, out: Path) -> None:
    """Copy a result to ``out``: large files compressed, folders as an archive without weights, which are too large."""
    if source.is_dir():
        with tarfile.open(out / f"{source.name}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name, filter=lambda file: None if LARGE.search(file.name) else file)
    elif source.stat().st_size > 2**20:
        with gzip.open(out / f"{source.name}.gz", "wb") as packed:
            packed.write(source.read_bytes())
    else:
        shutil.copy(source, out)


def install(wheels: Path, log: TextIO) -> Path:
    """Install the wheels into a folder that only the commands of this call use."""
    site = WORK / "site"
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        refuse(f"--wheels: there are none in {wheels}")
    options = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
    pip = subprocess.run([sys.executable, "-m", "pip", "install", *options, *found], stdout=log, stderr=log)
    if pip.returncode:  # such as wheels for another version of Python; most commands do not need them
        print(f"warning: --wheels: not installed, and {log.name} says why", file=sys.stderr, flush=True)
    return site


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [f"{o.part:8}{o.step:12}{o.outcome:12}{o.seconds:>6.0f} s   exit code {o.returncode}" for o in outcomes]
    return "\n".join(rows)


def printed_since(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def seen_in(printed: str) -> str:
    """What an exit code does not say: that a test failed before pytest was cut short, or that it skipped all tests."""
    progress = re.findall(r"^(?:\S+\.py )?([.sxXFE]+) *(?:\[ *\d+%\])?$", printed, re.MULTILINE)
    if any("F" in line or "E" in line for line in progress):
        return "failed"
    summary = "".join(re.findall(r"^=+ (.* in [\d.]+s.*) =+$", printed, re.MULTILINE)[-1:])
    return "skipped" if "skipped" in summary and not re.search("passed|failed|error", summary) else ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, epilog=ENDING, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--out", type=Path, help="folder of findings (default: $OUT, or runs/gpu/out)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for these commands")
    text = "for the whole call; commands for which none are left do not begin (default: as long as its parts may take)"
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help=text)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in small")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"parts: there is no {' or '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not args.dry_run and not has_gpu():
        parser.error("there is no CUDA GPU here; --dry-run shows on a CPU whether the commands work")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a shell's background
    work = WORK.with_name("gpu-dry-run") if args.dry_run else WORK
    if args.dry_run:
        shutil.rmtree(work, ignore_errors=True)
    out: Path = (args.out or Path(os.environ.get("OUT") or work / "out")).resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    folders = {"out": out, "work": work}
    outcomes: list[Outcome] = []
    end = time.monotonic() + args.seconds
    with (out / "log.txt").open("a") as log:
        site = install(args.wheels, log) if args.wheels else None
        for part in args.parts or PARTS:
            begun = limit = time.monotonic()
            if part == "tune" and not args.dry_run and (work / TABLE.name).exists():
                shutil.copy(work / TABLE.name, ROOT / TABLE)  # go on from what an earlier call has found
            for step in PARTS[part]:
                limit += step.seconds
                environ = environment(step, folders, args.dry_run, site)
                start, log_start = time.monotonic(), os.path.getsize(log.name)
                if end - start < LEAST:
                    outcomes.append(Outcome(part, step.name, "no time", 0.0, 0))
                    write_summary(out / "summary.json", outcomes)
                    print(table(outcomes[-1:]), flush=True)
                    continue
                outcome, code = "stopped", 130
                try:
                    outcome, code = run(step.arguments(folders, args.dry_run), min(limit, end) - start, environ, log)
                finally:  # also where this call itself is stopped
                    outcome = seen_in(printed_since(Path(log.name), log_start)) or outcome
                    outcomes.append(Outcome(part, step.name, outcome, time.monotonic() - start, code))
                    for source in (ROOT / path.format_map(folders) for path in step.keep):
                        if source.exists():
                            take_along(source, out)
                    if part == "tune" and not args.dry_run:
                        shutil.copy(ROOT / TABLE, work)
                    write_summary(out / "summary.json", outcomes)
                print(table(outcomes[-1:]), flush=True)
                if outcome != "passed" or step.shown:
                    print("\n".join(printed_since(Path(log.name), log_start).splitlines()[-25:]), flush=True)
            print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\n{table(outcomes)}\n\nin {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    return int(any(o.outcome == "failed" for o in outcomes))


def has_gpu() -> bool:
    try:
        import torch
    except ImportError as error:
        refuse(f"no PyTorch in {sys.executable} ({error}); make gpu PYTHON=... names another Python")
    return torch.cuda.is_available()


def refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def write_summary(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Add the outcomes to those of earlier calls; for a command that ran again, the last outcome stays."""
    rows = {(row["part"], row["step"]): row for row in (json.loads(path.read_text()) if path.exists() else [])}
    rows |= {(outcome.part, outcome.step): dataclasses.asdict(outcome) for outcome in outcomes}
    path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops it as Ctrl-C does
    try:  # without the training loop's console.start, because the packages that it needs may be in --wheels
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
