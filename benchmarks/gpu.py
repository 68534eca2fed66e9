"""Everything that needs a CUDA GPU, in four parts with limited time: tests,
tuning, benchmarks, training.

A part is a sequence of commands. A command that has used up its time is
interrupted, and the next one begins; it also gets the time that earlier ones
left over. Results go into the folder of --out ($OUT, or runs/gpu/out) as they
appear, and all output into `log.txt` there; the last lines printed give the
outcome of each command. `tune` writes the library's own table of
implementations and tiles, which all later commands use.

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
  {PROGRAM} train
      a second call continues from the last checkpoint
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
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
LARGE = re.compile("checkpoints|policy[.]safetensors")
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

    def arguments(self, folders: dict[str, Path], dry: bool) -> list[str]:
        return [argument.format_map(folders) for argument in (*self.command, *(self.small if dry else ()))]


def kernel_tests() -> tuple[str, ...]:
    """The files of the kernels' tests. The one that takes longest to compile goes first."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"), key=lambda file: file.name != "test_flow.py")
    return tuple(str(file.relative_to(ROOT)) for file in files if file.name != "test_sanitizer.py")


def bench(suite: str, seconds: float, small: str) -> Step:
    options = ("--benchmark-only", "--benchmark-columns=median,iqr,min,rounds", "--results={out}/bench.json")
    command = (*PYTEST, *options, "--seconds=0.5", f"benchmarks/test_{suite}.py")
    return Step(suite, seconds, command, ("--seconds=0", "-k", small))


def train(name: str, seconds: float, *options: str, small: tuple[str, ...], keep: tuple[str, ...]) -> Step:
    command = ("train/run.py", "--env", "halfcheetah-medium-expert", "--out", f"{{work}}/{name}")
    tiny = ("--device=cpu", "--actor-hidden=16", "16", "--critic-hidden=16", "--batch-size=32", "--flow-steps=2")
    short = ("--env=hopper-medium", "--dataset-size=5", "--eval-episodes=1", "--log-every=5")
    return Step(name, seconds, (*command, *options), (*short, *tiny, *small), keep=keep)


FEW_UPDATES = ("--preset", "full", "--steps", "200", "--eval-every", "1000", "--eval-episodes", "2", "--overwrite")
WARM_UPS = ("--flow-warmup", "20", "--critic-warmup", "20", "--steps", "20", "--eval-episodes", "1", "--overwrite")
TRACE = ("{work}/profile/trace.json", "{work}/profile/trace.txt")
SEEDS = (
    *("--preset", "full", "--num-seeds", "8", "--steps", "1_000_000"),
    *("--eval-every", "100_000", "--eval-episodes", "10", "--resume"),
)
TUNED_FLOW = ("--precision", "high", "bf16", "highest", "--rows", "256", "1536", "16384")
TINY_FLOW = ("--only", "score", "flow", "--hidden", "16", "16", "--cond-dim", "3", "--rows", "5", "--precision", "high")

PARTS: dict[str, tuple[Step, ...]] = {
    "check": (
        Step(
            "kernels",
            160,
            (*PYTEST, "-n", WORKERS, "--dist", "worksteal", *kernel_tests(), "-k", "not thousand"),
            ("-k", "4x6 and penalty and triton and float32"),
            interpreted=True,
        ),
        Step("sanitizer", 60, (*PYTEST, "-n", "4", "tests/kernels/test_sanitizer.py"), interpreted=True),
        Step(
            "races",
            40,
            (*PYTEST, "-n", "4", "tests/kernels/test_flow.py", "-k", "thousand"),
            ("-k", "dawdle"),
            interpreted=True,
        ),
        train("quick", 20, "--preset", "quick", *WARM_UPS, small=(), keep=()),
        train("profile", 50, "--profile", *FEW_UPDATES, small=("--steps=20",), keep=TRACE),
    ),
    "tune": (
        Step(
            "tune",
            240,
            # training's precision goes first: entries that are not reached stay as they are in the table
            ("-m", "fdkernels.tune", "--ship", "--only", "flow", "penalty", "score", *TUNED_FLOW),
            ("--dry-run", "--elements", "4096", *TINY_FLOW),
            interpreted=True,
            keep=("fdkernels/kernels/tuning/shipped.json",),
        ),
    ),
    "bench": (
        bench("update", 140, "ours-fql"),
        bench("flow", 115, "ours-1x"),
        bench("penalty", 60, "ours-256x4x6"),
        bench("decorator", 60, "ours-256x4"),
        bench("pullback", 55, "ours-256x2"),
        bench("seeds", 55, "alone"),
        bench("acting", 35, "ours-fql"),
        bench("score", 25, "ours-256"),
        bench("sampling", 25, "ours-256"),
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
    """passed, failed or cut short; failed also if a test failed before the command was cut short."""
    seconds: float
    returncode: int


def environment(step: Step, out: Path, dry: bool, site: Path | None) -> dict[str, str]:
    paths = [str(site)] * (site is not None) + [str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = dict(os.environ) | {"OUT": str(out), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
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
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *found], check=True, stdout=log, stderr=log)
    return site


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [f"{o.part:8}{o.step:12}{o.outcome:12}{o.seconds:>6.0f} s   exit code {o.returncode}" for o in outcomes]
    return "\n".join(rows)


def tail(log: Path, start: int, lines: int = 25) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, epilog=ENDING, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--out", type=Path, help="folder of findings (default: $OUT, or runs/gpu/out)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for these commands")
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
    out.mkdir(parents=True, exist_ok=True)
    folders = {"out": out, "work": work}
    outcomes: list[Outcome] = []
    with (out / "log.txt").open("a") as log:
        site = install(args.wheels, log) if args.wheels else None
        for part in args.parts or PARTS:
            begun = limit = time.monotonic()
            for step in PARTS[part]:
                limit += step.seconds
                start, log_start = time.monotonic(), os.path.getsize(log.name)
                environ = environment(step, out, args.dry_run, site)
                outcome, code = run(step.arguments(folders, args.dry_run), limit - start, environ, log)
                if failures(Path(log.name), log_start):
                    outcome = "failed"
                outcomes.append(Outcome(part, step.name, outcome, time.monotonic() - start, code))
                print(table(outcomes[-1:]), flush=True)
                if outcome != "passed":
                    print(tail(Path(log.name), log_start), flush=True)
                for source in (ROOT / path.format_map(folders) for path in step.keep):
                    if source.exists():
                        take_along(source, out)
                write_summary(out / "summary.json", outcomes)
            print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\n{table(outcomes)}\n\nin {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    return int(any(o.outcome == "failed" for o in outcomes))


def failures(log: Path, start: int) -> bool:
    """Whether pytest printed a failure before it was cut short, and so without a summary."""
    with log.open("rb") as file:
        file.seek(start)
        printed = file.read().decode(errors="replace")
    progress = re.findall(r"^(?:\S+\.py )?([.sxXFE]+) *(?:\[ *\d+%\])?$", printed, re.MULTILINE)
    return any("F" in line or "E" in line for line in progress)


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
