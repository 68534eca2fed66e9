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


def find(results: Results, op: str, **wanted: Any) -> list[Row]:
    """The rows of an operator with these fields or sizes."""
    rows = (row for row in results["rows"] if row["op"] == op)
    return [row for row in rows if all({**row["sizes"], **row}.get(name) == value for name, value in wanted.items())]


def ratios(theirs: Sequence[Row], ours: Sequence[Row], same: Sequence[str]) -> list[float]:
    """Their time over ours in each case, the fastest of each; ``same`` names the fields and sizes that make a case."""

    def best(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
        found: dict[tuple[Any, ...], float] = {}
        for row in rows:
            case = tuple({**row["sizes"], **row}[name] for name in same)
            found[case] = min(row["seconds"]["median"], found.get(case, float("inf")))
        return found

    fastest, own = best(theirs), best(ours)
    return [fastest[case] / own[case] for case in own if case in fastest]


def shares(results: Results, rows: Sequence[Row]) -> list[float]:
    """The time that the device's measured rates allow, over that of each row."""
    return [limit / row["seconds"]["median"] for row in rows if (limit := limit_seconds(results, row)) is not None]


def bars(results: Results) -> Iterator[Bar]:
    penalty, flow, chain = "fisher_penalty", "integrate_flow", "flow_fisher_penalty"
    ours = {"variant": "ours"}
    large = [row for row in find(results, penalty, **ours, timing="graph") if row["sizes"]["rows"] >= LARGE]
    large = [row for row in large if "backward" in row["detail"]]
    yield Bar("fisher_penalty, large: share of the copy bandwidth", 0.85, shares(results, large))
    small = {"rows": 256, "K": 4, "d": 6}
    for timing, least in (("graph", 5.0), ("eager", 1.5)):
        rows = find(results, penalty, **small, timing=timing)
        rows = [row for row in rows if "backward" in row["detail"]]
        theirs, own = ([row for row in rows if row["variant"] == name] for name in ("eager", "ours"))
        how = {"graph": "GPU time", "eager": "wall time"}[timing]
        yield Bar(f"fisher_penalty, 256 rows, {how}: times the matrix form", least, ratios(theirs, own, ["rows"]))
        if timing == "graph":
            compiled = [row for row in rows if row["variant"] == "eager, torch.compile"]
            text = f"fisher_penalty, 256 rows, {how}: times torch.compile of it"
            yield Bar(text, 1.5, ratios(compiled, own, ["rows"]))

    case = ["rows", "obs", "precision"]
    own = [row for row in find(results, flow, **ours) if row["sizes"]["rows"] in (256, 1536)]
    issued = [row for row in own if row["timing"] == "eager"]
    text = "integrate_flow, 256 and 1,536 rows: times eager"
    yield Bar(text, 6.0, ratios(find(results, flow, variant="eager", timing="eager"), issued, case))
    theirs = find(results, flow, variant="eager, max-autotune") + find(results, flow, variant="eager", timing="graph")
    yield Bar("integrate_flow, 256 and 1,536 rows: times max-autotune or a graph", 1.5, ratios(theirs, own, case))
    many = [row for row in find(results, flow, **ours, timing="graph") if row["sizes"]["rows"] >= LARGE]
    yield Bar("integrate_flow, 16,384 rows: share of the matrix rate", 0.6, shares(results, many))

    case = ["states", "K", "precision", "timing"]
    parts, whole = find(results, chain, variant="our parts"), find(results, chain, **ours)
    yield Bar("flow_fisher_penalty: times its parts one by one", 1.0, ratios(parts, whole, case))

    update, case = "fidec update", ["K", "obs", "detail"]
    captured = find(results, update, variant="ours, captured")
    for variant, least in (("eager, torch.compile", 3.0), ("JAX", 2.0)):
        yield Bar(
            f"FiDec update: times {variant}", least, ratios(find(results, update, variant=variant), captured, case)
        )
    yield Bar("FiDec updates per second", 1000, [1 / row["seconds"]["median"] for row in captured])

    seeds, case = "eight seeds of fidec, one update each", ["K", "obs"]
    one, eight = (find(results, seeds, variant=f"ours, {name}") for name in ("one seed alone", "together"))
    yield Bar("a seed's time over that of eight together", 1 / 1.5, ratios(one, eight, case))


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
