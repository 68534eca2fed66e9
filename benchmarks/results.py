"""Files of results: rows, each with a reference to its run. A run on another device never overwrites them."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fdkernels
from train.reading import read_json

PROGRAM = "python benchmarks/results.py"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "fdkernels",
    "pytest-benchmark",
    "torchdiffeq",
    "torchrl",
    "jax",
    "flax",
    "optax",
)
IDENTITY = ("op", "group", "label")
"""Two rows that agree in these are the same measurement."""

RECENT = datetime.timedelta(minutes=15)
"""As long as one process's rates of the device serve others."""

Results = dict[str, Any]


class ResultError(RuntimeError):
    """A problem that the user can fix."""


def describe_run(device: str, threads: int) -> Results:
    """Everything that the rows of a run share. Roofs and clocks are added with the first row."""
    commit, dirty = _commit()
    return {
        "device": device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pytest", *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "threads": threads,
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "not_measured": [],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"fdkernels": fdkernels.__version__}


def _commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether it has changes. Without git, the commit is $BENCH_COMMIT."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT"), None


def load(path: Path) -> Results:
    try:
        results = read_json(path)
        devices = {row["device"] for row in results["rows"]} | {run["device"] for run in results["runs"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path} is not a file of results ({type(error).__name__}: {error})") from error
    if len(devices) != 1:
        raise ResultError(f"{path} holds results of {len(devices)} devices: {', '.join(sorted(devices)) or 'none'}")
    return results


def device_of(results: Results) -> str:
    return next(iter(results["runs"].values()))["device"]


def limit_seconds(results: Results, row: dict[str, Any]) -> float | None:
    """The shortest time that the roofs of the row's run allow."""
    roofs = results["runs"][row["run"]]["roofs"]
    needed = []
    if row["bytes"]:
        needed.append(row["bytes"] / roofs["copy_bytes"])
    if row["flops"]:
        needed.append(row["flops"] / roofs[f"{row['precision']}_flops"])
    return max(needed, default=None)


class ResultFile:
    """Writes the rows of a run to ``path`` as they come, beside those of earlier runs on the same device.

    A row replaces an earlier one of the same measurement. A file from another device is refused.
    """

    def __init__(self, path: Path, run: Results) -> None:
        self.path, self.run = path, run
        self.results: Results = {"runs": {}, "rows": []}
        if path.exists():
            self.results = load(path)
            theirs = device_of(self.results)
            if theirs != run["device"]:
                raise ResultError(f"{path} holds results of {theirs}, and this is {run['device']}: give another file")
        self.run_id = f"{run['date']} {(run['commit'] or 'unknown')[:10]}"

    def recent_roofs(self) -> Results | None:
        """The rates that another process measured here within the last quarter of an hour, and when."""
        now = datetime.datetime.fromisoformat(self.run["date"])
        for run in self.results["runs"].values():
            measured = run.get("roofs_date", run["date"])
            recent = now - datetime.datetime.fromisoformat(measured) < RECENT
            if recent and "roofs" in run and all(run[name] == self.run[name] for name in ("versions", "threads")):
                return {"roofs": run["roofs"], "roofs_date": measured}
        return None

    def add(self, row: Results) -> None:
        self.results["runs"][self.run_id] = self.run
        self.results = with_row(self.results, row | {"run": self.run_id})
        self.write()

    def write(self) -> None:
        write(self.path, self.results)


def write(path: Path, results: Results) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which must not be followed
    with partial.open("x") as file:
        file.write(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def with_row(results: Results, row: Results) -> Results:
    """The results with one more row. Runs that no row refers to any more are dropped."""
    rows = [other for other in results["rows"] if any(other[name] != row[name] for name in IDENTITY)] + [row]
    used = {other["run"] for other in rows}
    return {"runs": {name: run for name, run in results["runs"].items() if name in used}, "rows": rows}


def merge_results(parts: Iterable[tuple[Path, Results]]) -> Results:
    """All rows of the parts, which must come from one device. If two measure the same, the later part's row wins."""
    merged: Results = {"runs": {}, "rows": []}
    for path, part in parts:
        if merged["runs"] and device_of(merged) != device_of(part):
            raise ResultError(f"{path} holds results of {device_of(part)}, what comes before it of {device_of(merged)}")
        merged["runs"] |= part["runs"]
        for row in part["rows"]:
            merged = with_row(merged | {"runs": merged["runs"] | part["runs"]}, row)
    return merged


def main(argv: list[str] | None = None) -> int:
    # not with train/options.py: benchmarks import this file on machines that have little more than PyTorch
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Merge files of results of one device. Where two measured the same, the later one's row stays.",
        epilog=f"example: {PROGRAM} --into benchmarks/results/h100.json penalty.json flow.json",
    )
    parser.add_argument("parts", type=Path, nargs="+", help="files of results")
    parser.add_argument("--into", type=Path, required=True, help="file that takes their rows; made if it is not there")
    args = parser.parse_args(argv)
    try:
        files = ([args.into] if args.into.exists() else []) + args.parts
        results = merge_results((path, load(path)) for path in files)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(args.into, results)
    print(f"{args.into}: {len(results['rows'])} rows of {device_of(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
