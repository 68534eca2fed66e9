"""Compare a run with a saved one on the same device, as ratios with their spread, to see what a change did.

"time" is old over new, so values above 1 are faster; its interval comes from the quartiles of both. Machines drift
between runs, so the verdict uses the speed-ups over the eager baseline, which was timed in the same rounds: "against
eager" is the new speed-up divided by the old one. A contestant counts as faster or slower if that whole interval lies
more than 2 % away from 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.results import IDENTITY, ResultError, Results, device_of, load
from train import options
from train.outputs import console
from train.outputs.console import Ending, Output

MARGIN = 0.02
PROGRAM = "python benchmarks/compare.py"
EXAMPLES = (
    (
        f"{PROGRAM} saved.json runs/bench-now.json",
        "what a change did; `make bench-compare BASE=...` measures first",
    ),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig(Output):
    """Compare a run with a saved one on the same device. "time" is old over new, so values above 1 are faster. Machines
    drift, so the verdict uses "against eager", the new speed-up over eager PyTorch divided by the old one: a contestant
    is faster or slower if that whole interval lies more than 2 % away from 1."""

    base: tyro.conf.Positional[Path]
    """File of the saved run."""
    new: tyro.conf.Positional[Path]
    """File of the new run."""


class Ratio(NamedTuple):
    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} – {self.high:.2f})"


class Change(NamedTuple):
    group: str
    label: str
    time: Ratio
    against_eager: Ratio
    verdict: str


def ratio(above: dict[str, float], below: dict[str, float]) -> Ratio:
    """Ratio of two medians; the interval takes the quartiles that make it widest."""
    return Ratio(above["q25"] / below["q75"], above["median"] / below["median"], above["q75"] / below["q25"])


def compare(base: Results, new: Results) -> tuple[list[Change], list[str]]:
    """The changes, and the measurements that only one of the two files has."""
    if device_of(base) != device_of(new):
        raise ResultError(f"the saved run is of {device_of(base)}, the new one of {device_of(new)}")
    old = {tuple(row[name] for name in IDENTITY): row for row in base["rows"]}
    now = {tuple(row[name] for name in IDENTITY): row for row in new["rows"]}
    changes = []
    for key, row in now.items():
        if key not in old:
            continue
        time = ratio(old[key]["seconds"], row["seconds"])
        against_eager = ratio(row["speedup"], old[key]["speedup"])
        verdict = ""
        if against_eager.low > 1 + MARGIN:
            verdict = "faster"
        elif against_eager.high < 1 - MARGIN:
            verdict = "slower"
        changes.append(Change(row["group"], row["label"], time, against_eager, verdict))
    lonely = [f"only in the saved run: {key[1]}: {key[2]}" for key in old if key not in now]
    lonely += [f"only in the new run: {key[1]}: {key[2]}" for key in now if key not in old]
    return changes, lonely


def text(changes: list[Change], lonely: list[str]) -> str:
    lines, group = [], None
    for change in changes:
        if change.group != group:
            group = change.group
            lines += ["", group, f"  {'':34}{'time: old / new':>24}{'against eager':>24}"]
        lines.append(f"  {change.label:34}{change.time!s:>24}{change.against_eager!s:>24}  {change.verdict}")
    return "\n".join([*lines, "", *lonely])


def parse(argv: Sequence[str] | None) -> CompareConfig:
    return options.parse(CompareConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    return console.conclude(lambda: compared(config), config, (ResultError,))


def compared(config: CompareConfig) -> Ending:
    changes, lonely = compare(load(config.base), load(config.new))
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("faster", "slower")}
    last = f"{len(changes)} compared: {counts['faster']} faster, {counts['slower']} slower"
    rows = [change._asdict() for change in changes]
    return Ending(f"{text(changes, lonely)}\n{last}", {**counts, "rows": rows, "only_in_one": lonely})


if __name__ == "__main__":
    console.start(main)
