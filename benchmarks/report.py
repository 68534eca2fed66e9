"""Draw tables and pictures from files of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import ResultError, Results, device_of, limit_seconds, load, merge_results
from train import options
from train.outputs import console
from train.outputs.console import Ending, Output

PROGRAM = "python benchmarks/report.py"
EXAMPLES = (
    (f"{PROGRAM} runs/bench.json", "into runs/bench-report"),
    (f"{PROGRAM} penalty.json flow.json --out DIR", "several parts, all from one device"),
)
Row = dict[str, Any]
OURS = ["#dc2626", "#f97316", "#7f1d1d", "#f9a8d4", "#b45309", "#fb7185", "#facc15", "#be185d"]  # warm
THEIRS = ["#1f2937", "#2563eb", "#0d9488", "#9333ea", "#0ea5e9", "#65a30d", "#64748b", "#67e8f9"]  # cold
INK = "#374151"
NOTE: dict[str, Any] = {"fontsize": 8, "color": INK}


# -- tables ----------------------------------------------------------------------------------------------------------


def groups(results: Results) -> dict[str, list[Row]]:
    """Rows by table, in the order they were measured, but with the baseline first."""
    found: dict[str, list[Row]] = {}
    for row in results["rows"]:
        found.setdefault(row["group"], []).append(row)
    return {group: sorted(rows, key=lambda row: not is_baseline(row)) for group, rows in found.items()}


def is_baseline(row: Row) -> bool:
    return row["label"] == row["baseline"]


def is_ours(row: Row) -> bool:
    return row["variant"].startswith("our")


def markdown(results: Results, sources: Iterable[Path]) -> str:
    """The whole report as Markdown."""
    files = ", ".join(f"`{path}`" for path in sources)
    lines = [f"# Benchmarks on {device_of(results)}", "", f"From {files} by `python benchmarks/report.py`.", ""]
    lines += [
        "Times are per call: the median of the rounds, and their quartiles in brackets. The speed-up is over the first "
        "line of each table, which is timed in every round right before the contestant; it is the median of these "
        "paired ratios with their quartiles, and that of the first line over itself is the noise of the machine. The "
        "limit is the time that the copy bandwidth and matrix rate measured beside them allow for the bytes and "
        "operations that the task needs. The error is relative to a float64 reference.",
        "",
    ]
    for group, rows in groups(results).items():
        lines += [f"## {group}", "", *table(results, rows), ""]
    lines += ["## Where the figures come from", ""]
    for name, run in results["runs"].items():
        lines += [f"- run {name}", *(f"  - {line}" for line in described(run))]
    unmeasured = {line for run in results["runs"].values() for line in run["not_measured"]}
    if unmeasured:
        lines += ["", "## Not measured", "", *(f"- {line}" for line in sorted(unmeasured))]
    return "\n".join(lines) + "\n"


def table(results: Results, rows: list[Row]) -> list[str]:
    lines = [
        "| | time per call | speed-up | of the limit | memory | first call | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = share_of_limit(results, row)
        name = f"**{row['label']}**" if is_ours(row) else row["label"]
        cells = [
            f"{name}{' (events)' if row['clock'] != 'wall' else ''}",
            spread(row["seconds"], duration),
            spread(row["speedup"], lambda x: f"{x:.2f}"),
            f"{100 * share:.0f} %" if share else "",
            size(row["peak_memory_bytes"]),
            duration(row["first_call_seconds"]),
            f"{row['relative_error']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def described(run: Results) -> list[str]:
    commit = f"{run['commit']}{' with changes' if run['dirty'] else ''}"
    roofs = run["roofs"]
    rates = [
        f"{name.removesuffix('_flops')} {rate / 1e12:.3g} TFLOP/s" for name, rate in roofs.items() if "flops" in name
    ]
    return [
        f"`{run['command']}`, commit {commit}",
        f"{run['device']}, {run['threads']} threads, {run['platform']}; {run['clocks']}",
        ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        f"copy {roofs['copy_bytes'] / 1e9:.1f} GB/s; products {', '.join(rates)}",
    ]


def share_of_limit(results: Results, row: Row) -> float | None:
    limit = limit_seconds(results, row)
    return None if limit is None else limit / row["seconds"]["median"]


def spread(quartiles: dict[str, float], written: Any) -> str:
    return f"{written(quartiles['median'])} ({written(quartiles['q25'])} – {written(quartiles['q75'])})"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def size(count: int | None) -> str:
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


# -- pictures --------------------------------------------------------------------------------------------------------


def colours(rows: Iterable[Row]) -> dict[str, str]:
    """A colour for each label; ours are warm and stand out."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    theirs = [label for label in labels if not label.startswith("our")]
    found = {label: THEIRS[i % len(THEIRS)] for i, label in enumerate(theirs)}
    mine = [label for label in labels if label.startswith("our")]
    return found | {label: OURS[i % len(OURS)] for i, label in enumerate(sorted(mine))}


def error_bars(quartiles: dict[str, float]) -> list[list[float]]:
    return [[quartiles["median"] - quartiles["q25"]], [quartiles["q75"] - quartiles["median"]]]


def draw_speedups(results: Results, path: Path) -> None:
    """Draw the speed-up of every contestant of every table over its baseline, with quartiles."""
    tables = groups(results)
    colour = colours(results["rows"])
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.42 * len(tables)), layout="constrained")
    for y, rows in enumerate(tables.values()):
        contestants = [row for row in rows if not is_baseline(row)]
        for i, row in enumerate(contestants):
            offset = 0.6 * ((i + 0.5) / len(contestants) - 0.5)
            own = row["speedup"]
            style = {"color": colour[row["label"]], "markersize": 5 if is_ours(row) else 4, "elinewidth": 1.2}
            axes.errorbar(own["median"], y + offset, xerr=error_bars(own), fmt="o", label=row["label"], **style)
        noise = next((row["speedup"] for row in rows if is_baseline(row)), None)
        if noise is not None:
            axes.fill_betweenx([y - 0.45, y + 0.45], noise["q25"], noise["q75"], color="#d1d5db", linewidth=0, zorder=0)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(tables)), tables, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", color="#f3f4f6")
    axes.set_xlabel("speed-up over the baseline (grey: the baseline over itself)")
    axes.set_title(f"Speed-ups on {device_of(results)}", color=INK)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def draw_roofline(results: Results, path: Path) -> None:
    """Plot operations per second over operations per byte, under the roofs that the same runs measured."""
    rows = [row for row in results["rows"] if row["flops"] and row["bytes"]]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    roofs = next(iter(results["runs"].values()))["roofs"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 3, max(intensities) * 5
    for name, rate in roofs.items():
        if not name.endswith("_flops"):
            continue
        knee = rate / roofs["copy_bytes"]
        xs = [low, max(knee, low), max(high, knee)]
        axes.plot(xs, [min(rate, x * roofs["copy_bytes"]) for x in xs], color="#9ca3af", linewidth=1.2, zorder=1)
        rate_text = f"{name.removesuffix('_flops')}: {rate / 1e12:.3g} TFLOP/s"
        axes.annotate(rate_text, (xs[-1], rate), ha="right", va="bottom", **NOTE)
    copy_text = f"copy: {roofs['copy_bytes'] / 1e9:.3g} GB/s"
    axes.annotate(copy_text, (low, low * roofs["copy_bytes"]), xytext=(12, 0), textcoords="offset points", **NOTE)
    markers = dict(zip(dict.fromkeys(row["op"] for row in rows), "os^Dv*P"))
    for kind, colour in (("theirs", THEIRS[0]), ("ours", OURS[0])):
        for row in rows:
            if is_ours(row) != (kind == "ours") or not (is_ours(row) or is_baseline(row)):
                continue
            low_precision = row["precision"] != row["baseline_precision"]
            name = (
                f"{row['op']}, {'ours' if is_ours(row) else 'eager'}{', ' + row['precision'] if low_precision else ''}"
            )
            style = {"color": colour, "markersize": 6, "fillstyle": "none" if low_precision else "full"}
            rate = row["flops"] / row["seconds"]["median"]
            axes.plot(row["flops"] / row["bytes"], rate, markers[row["op"]], label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that the task needs")
    axes.set_ylabel("operations per second")
    axes.set_title(f"Roofline of {device_of(results)}, roofs measured beside it", color=INK)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles, fontsize=8, frameon=False, loc="lower right")
    _save(figure, path)


def draw_rows(results: Results, path: Path, op: str = "integrate_flow") -> None:
    """Plot time over the number of rows, for each contestant."""
    rows = [row for row in results["rows"] if row["op"] == op]
    narrowest = min((row["sizes"]["obs"] for row in rows), default=None)
    rows = [row for row in rows if row["sizes"]["obs"] == narrowest]
    if len({row["sizes"]["rows"] for row in rows}) < 2:
        return
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    colour = colours(rows)
    for label in colour:
        points = sorted((row for row in rows if row["label"] == label), key=lambda row: row["sizes"]["rows"])
        xs, seconds = [row["sizes"]["rows"] for row in points], [row["seconds"] for row in points]
        axes.plot(
            xs, [s["median"] for s in seconds], "o-", color=colour[label], label=label, markersize=4, linewidth=1.4
        )
        axes.fill_between(xs, [s["q25"] for s in seconds], [s["q75"] for s in seconds], color=colour[label], alpha=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row["sizes"]["rows"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    decades = [10.0**k for k in range(-6, 2)]
    low, high = axes.get_ylim()
    shown = [m * decade for decade in decades for m in (1, 3) if low <= m * decade <= high]
    axes.set_yticks(shown, [duration(tick) for tick in shown])
    axes.set_xlabel("rows")
    axes.set_ylabel("time per call, median and quartiles")
    axes.set_title(f"{op}, 4×512, 10 Euler steps, on {device_of(results)}", color=INK)
    axes.grid(color="#f3f4f6")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


PICTURES = {"speedups.png": draw_speedups, "roofline.png": draw_roofline, "rows.png": draw_rows}


@dataclasses.dataclass(frozen=True)
class ReportConfig(Output):
    """Draw tables and pictures from files of results."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files of results of one device."""
    out: Path | None = None
    """Folder for report.md and the pictures. None: beside the first file."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results must be one or more files, got none")


def parse(argv: Sequence[str] | None) -> ReportConfig:
    return options.parse(ReportConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    return console.conclude(lambda: report(config), config, (ResultError, OSError))


def report(config: ReportConfig) -> Ending:
    out = config.out or config.results[0].with_name(f"{config.results[0].stem}-report")
    results = merge_results((path, load(path)) for path in config.results)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(results, config.results)
    for name, draw in PICTURES.items():
        (out / name).unlink(missing_ok=True)
        draw(results, out / name)
        if (out / name).exists():
            text += f"\n![{name.removesuffix('.png')}]({name})\n"
    (out / "report.md").write_text(text)
    rows, device = len(results["rows"]), device_of(results)
    return Ending(f"{out}/report.md: {rows} rows of {device}", {"folder": out, "rows": rows, "device": device})


if __name__ == "__main__":
    console.start(main)
