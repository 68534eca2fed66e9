"""What the library promises on a GPU, and whether a file of results keeps it.

A promise has several cases, such as sizes and precisions, and is kept if the worst one keeps it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import ResultError, Results, device_of, limit_seconds, load

PROGRAM = "python benchmarks/bars.py"
LARGE = 16384
"""Rows from which a flow should be bound by its products, and a penalty by memory."""
Row = dict[str, Any]


class Bar(NamedTuple):
    promise: str
    least: float
    measured: list[float]
    """Of each case."""

    @property
    def verdict(self) -> str:
        if not self.measured:
            return "not measured"
        return "kept" if min(self.measured) >= self.least else "missed"


def find(results: Results, **wanted: Any) -> list[Row]:
    """The rows with these fields and sizes."""
    rows = ({**row["sizes"], **row} for row in results["rows"])
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def ratios(rivals: Sequence[Sequence[Row]], ours: Sequence[Row], same: Sequence[str], clock: str) -> list[float]:
    """The best rival's time over ours in each case in which all were measured.

    Args:
        rivals: the rows of each.
        same: the fields and sizes that make a case, of which the fastest row counts.
        clock: "seconds", in which graphs are timed on the device, or "wall_seconds".
    """

    def best(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
        found: dict[tuple[Any, ...], float] = {}
        for row in rows:
            case = tuple(row[name] for name in same)
            found[case] = min(row[clock]["median"], found.get(case, float("inf")))
        return found

    theirs, own = [best(rows) for rows in rivals], best(ours)
    cases = [case for case in own if all(case in rival for rival in theirs)]
    return [min(rival[case] for rival in theirs) / own[case] for case in cases]


def shares(results: Results, rows: Sequence[Row]) -> list[float]:
    """The time that the device's measured rates allow, over that of each row."""
    return [limit / row["seconds"]["median"] for row in rows if (limit := limit_seconds(results, row)) is not None]


def of_penalty(results: Results) -> Iterator[Bar]:
    both = {"op": "fisher_penalty", "detail": "forward and backward, GPU time"}
    large = [row for row in find(results, **both, variant="ours") if row["rows"] >= LARGE]
    yield Bar("fisher_penalty, large: share of the copy bandwidth", 0.85, shares(results, large))
    small = {"rows": 256, "K": 4, "d": 6}
    eager, compiled, ours = (
        find(results, **both, **small, variant=variant) for variant in ("eager", "eager, torch.compile", "ours")
    )
    text = "fisher_penalty, 256 rows, GPU time: times"
    yield Bar(f"{text} the matrix form", 5.0, ratios([eager], ours, ["rows"], "seconds"))
    yield Bar(f"{text} torch.compile of it", 1.5, ratios([compiled], ours, ["rows"], "seconds"))
    both |= {"detail": "forward and backward"}
    eager, ours = (find(results, **both, **small, variant=variant) for variant in ("eager", "ours"))
    text = "fisher_penalty, 256 rows, wall time: times the matrix form"
    yield Bar(text, 1.5, ratios([eager], ours, ["rows"], "wall_seconds"))


def of_flow(results: Results) -> Iterator[Bar]:
    flow, case = {"op": "integrate_flow"}, ["rows", "obs", "precision"]
    everything = find(results, **flow, variant="ours")
    ours = [row for row in everything if row["rows"] in (256, 1536)]
    issued, looped = (find(results, **flow, variant="eager", timing=timing) for timing in ("eager", "graph"))
    text, one_by_one = "integrate_flow, 256 and 1,536 rows: times", [row for row in ours if row["timing"] == "eager"]
    yield Bar(f"{text} eager", 6.0, ratios([issued], one_by_one, case, "wall_seconds"))
    tuned = find(results, **flow, variant="eager, max-autotune")
    text += " the better of max-autotune and a graph of the loop"
    yield Bar(text, 1.5, ratios([tuned, looped], ours, case, "wall_seconds"))
    many = [row for row in everything if row["rows"] >= LARGE and row["timing"] == "graph"]
    yield Bar("integrate_flow, 16,384 rows: share of the matrix rate", 0.6, shares(results, many))
    parts, whole = (find(results, op="flow_fisher_penalty", variant=variant) for variant in ("our parts", "ours"))
    case = ["states", "K", "precision", "timing"]
    yield Bar("flow_fisher_penalty: times its parts one by one", 1.0, ratios([parts], whole, case, "seconds"))


def of_update(results: Results) -> Iterator[Bar]:
    """In TF32, with the published number of samples."""
    update = {"op": "fidec update", "K": 4, "detail": "tf32"}
    compiled, jax, ours = (
        find(results, **update, variant=variant) for variant in ("eager, torch.compile", "JAX", "ours, captured")
    )
    yield Bar("FiDec update: times eager with torch.compile", 3.0, ratios([compiled], ours, ["obs"], "seconds"))
    yield Bar("FiDec update: times JAX", 2.0, ratios([jax], ours, ["obs"], "seconds"))
    yield Bar("FiDec updates per second", 1000, [1 / row["seconds"]["median"] for row in ours])
    one, eight = (
        find(results, op="eight seeds of fidec, one update each", variant=variant)
        for variant in ("ours, one seed alone", "ours, together")
    )
    yield Bar("a seed's time over that of eight together", 1 / 1.5, ratios([one], eight, ["obs"], "seconds"))


def bars(results: Results) -> Iterator[Bar]:
    for part in (of_penalty, of_flow, of_update):
        yield from part(results)


def table(results: Results) -> list[str]:
    lines = ["| promise | at least | measured | |", "|---|---|---|---|"]
    for bar in bars(results):
        low, high = (f"{pick(bar.measured):,.3g}" if bar.measured else "" for pick in (min, max))
        measured = low if low == high else f"{low} to {high} in {len(bar.measured)} cases"
        lines.append(f"| {bar.promise} | {bar.least:,.3g} | {measured} | {bar.verdict} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    # not with train/options.py: as in results.py, for machines that have little more than PyTorch
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=f"example: {PROGRAM} runs/gpu/out/bench.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="file of results of a GPU")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
        print(f"{device_of(results)}\n\n" + "\n".join(table(results)))
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
