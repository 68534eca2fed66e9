"""Watch a long run: does it need more memory, open files, threads or disk the longer it goes on?

    python tests/faults/soak.py --minutes 60

The run is real but hurried: it logs, evaluates, draws its curve and writes checkpoints hundreds of times as often as
usual, so that an hour has as many of each as weeks have. After ten minutes, or a third of a shorter run, it must be
flat. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.waiting import PATIENCE
from train.outputs.checkpoint import KEPT, newest_step

REPOSITORY = Path(__file__).parents[2]
EVAL_EVERY = 200
MB_OF_AN_EVALUATION = 0.001  # in a checkpoint; 0.0006 were measured
RUN = (
    "--env hopper-medium --dataset-size 10 --preset quick --device cpu --steps 100000000 --actor-hidden 64 64 "
    f"--critic-hidden 64 64 --flow-warmup 20 --critic-warmup 20 --no-anneal --log-every 20 --eval-every {EVAL_EVERY} "
    "--eval-episodes 2 --acting sample --checkpoint-every 50"
).split()


class Sample(NamedTuple):
    """One look at the run."""

    seconds: float
    steps: int
    rss: float
    """MB, without pages of files, which come and go"""
    files: int
    threads: int
    disk: float
    """MB of checkpoints"""


def look(pid: int, out: Path, seconds: float) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    checkpoints, sizes = list((out / "checkpoints").glob("*")), []
    for file in checkpoints:
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # replaced in this moment
            continue
    return Sample(
        seconds,
        newest_step(out / "checkpoints"),
        int(status["RssAnon"].split()[0]) / 1024,
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
        sum(sizes) / 2**20,
    )


def soak(out: Path, minutes: float, every: float) -> list[Sample]:
    """Run for so many minutes, looking every so many seconds; the run must stop cleanly at the end."""
    command = [sys.executable, str(REPOSITORY / "train" / "run.py"), *RUN, "--out", str(out), "--overwrite"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        try:
            start, samples = time.monotonic(), []
            while time.monotonic() - start < 60 * minutes:
                time.sleep(every)
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended:\n{out.with_suffix('.log').read_text()[-2000:]}")
                if (sample := look(process.pid, out, time.monotonic() - start)).steps:
                    samples.append(sample)
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(timeout=PATIENCE)) != 130:
                raise RuntimeError(f"the run ended with {code}:\n{out.with_suffix('.log').read_text()[-2000:]}")
        finally:
            process.kill()  # if it still runs
    return samples


def growth(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Of each figure: its median in the first half after the beginning, and in the second."""
    first, last = samples[0].seconds, samples[-1].seconds
    settled = [s for s in samples if s.seconds - first > min(600, (last - first) / 3)]
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    names = ("steps", "rss", "files", "threads", "disk")
    return {name: tuple(statistics.median(getattr(s, name) for s in half) for half in halves) for name in names}  # type: ignore[misc]


def problems(samples: list[Sample]) -> list[str]:
    """What grew. Memory may by 2 %: pages of the heap come and go. Checkpoints hold the evaluations so far."""
    found = growth(samples)
    before, after = found.pop("steps")
    rows = KEPT * MB_OF_AN_EVALUATION * (after - before) / EVAL_EVERY
    allowed = {name: a for name, (a, _) in found.items()}
    allowed |= {"rss": 1.02 * allowed["rss"], "disk": 1.02 * allowed["disk"] + rows}
    return [f"{name} grew from {a:.2f} to {b:.2f}" for name, (a, b) in found.items() if b > allowed[name]]


def report(samples: list[Sample]) -> str:
    lines = ["| minutes | updates | RSS, MB | open files | threads | checkpoints, MB |", "|---" * 6 + "|"]
    for sample in samples[:: max(1, len(samples) // 12)] + samples[-1:]:
        lines.append(
            f"| {sample.seconds / 60:.1f} | {sample.steps:,} | {sample.rss:.0f} | {sample.files} | {sample.threads} "
            f"| {sample.disk:.2f} |"
        )
    return "\n".join([*lines, "", "; ".join(problems(samples)) or "flat"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between looks")
    parser.add_argument("--out", type=Path, help="folder of the run; a temporary one by default")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
    samples = soak(folder / "run", args.minutes, args.every)
    print(report(samples))
    if args.out is None:
        shutil.rmtree(folder)
    return int(bool(problems(samples)))


if __name__ == "__main__":
    sys.exit(main())
