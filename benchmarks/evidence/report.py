"""Tables and pictures of the answers."""

from __future__ import annotations

import collections
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.evidence import gain, kl, returns
from benchmarks.evidence.densities import DENSITIES
from benchmarks.evidence.metrics import METRICS

Answer = dict[str, Any]
COLOURS = {
    "isotropic": "#8a8f98",
    "score": "#d9822b",
    "score-mean": "#d9822b",
    "score-0.8": "#b45309",
    "score-mean-0.8": "#b45309",
    "cross": "#9333ea",
    "covariance": "#3a8f5c",
    "path": "#7fb2e5",
    "pullback": "#1f5fa8",
    "pullback-mean": "#1f5fa8",
}
DRAWN = ("isotropic", "score-mean", "score-mean-0.8", "covariance", "path", "pullback-mean")
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 10}
VARIANT_TITLES = {
    "isotropic": "isotropic, ‖δ‖²",
    "score": "Fisher, t = 0.95, K = 4 (published)",
    "pullback": "pull-back, 2 views (ours)",
}


def draw(data: Path, out: Path, sections: Iterable[str]) -> list[Path]:
    """Draw what there are answers for: OUT/SECTION.md and OUT/SECTION.png."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections:
        answers = [json.loads(path.read_text()) for path in sorted((data / section).glob("*.json"))]
        if not answers:
            continue
        table, picture = SECTIONS[section](answers)
        text, image = out / f"{section}.md", out / f"{section}.png"
        text.write_text(table + "\n")
        picture.savefig(image, dpi=130)
        plt.close(picture)
        written += [text, image]
    return written


def seeds(answers: Sequence[Answer], *keys: str | int, **fixed: Any) -> list[float]:
    """What the answers that have these fields hold under the keys, one number for each seed."""
    found = []
    for answer in answers:
        value: Any = answer if all(answer[name] == wanted for name, wanted in fixed.items()) else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else value and value[key]
        if value is not None:
            found.append(value)
    return found


def cell(numbers: Sequence[float], digits: int = 2) -> str:
    """The mean over seeds, and the lowest and the highest."""
    if not numbers:
        return ""
    low, mean, high = (f"{x:.{digits}f}" for x in (min(numbers), statistics.fmean(numbers), max(numbers)))
    return f"{mean} ({low} to {high})" if len(numbers) > 1 else mean


def power(numbers: Sequence[float]) -> str:
    """The measured power, if there is an error to be measured in every seed."""
    return cell(numbers, 1) if numbers and min(numbers) > 0 else "no error"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def band(ax: Axes, points: Mapping[float, Sequence[float]], label: str, key: str, **style: Any) -> None:
    """A line through the means over seeds, in a band from the lowest to the highest."""
    xs = sorted(x for x, ys in points.items() if ys)
    width = 2.4 if key.startswith("pullback") else 1.4
    ax.plot(
        xs,
        [statistics.fmean(points[x]) for x in xs],
        marker="o",
        ms=3,
        lw=width,
        color=COLOURS[key],
        label=label,
        **style,
    )
    ax.fill_between(
        xs, [min(points[x]) for x in xs], [max(points[x]) for x in xs], color=COLOURS[key], alpha=0.15, lw=0
    )


def panels(count: int, title: str, width: float = 3.3) -> tuple[Any, Sequence[Axes]]:
    with plt.rc_context(STYLE):
        size = width * count, 3.6
        figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, axes[0]


def count_updates(ax: Axes, updates: Sequence[int]) -> None:
    """A logarithmic axis of a flow's updates."""
    ax.set(xscale="log", xlabel="updates")
    ax.set_xticks(updates, [f"{n // 1000}k" for n in updates])
    ax.minorticks_off()


def legend(figure: Any, ax: Axes) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)


def draw_gain(answers: Sequence[Answer]) -> tuple[str, Any]:
    updates = sorted({a["updates"] for a in answers})
    shown = [n for n in updates if n in (updates[1], updates[-1])]
    head = ["metric", "rows a state"] + [f"{DENSITIES[name].title}, {n // 1000}k" for name in gain.NAMES for n in shown]
    rows = []
    for label, metric in METRICS.items():
        row = [f"**{metric.title}**" if label == "pullback-mean" else metric.title, f"{metric.evaluations:,}"]
        for name in gain.NAMES:
            for n in shown:
                row.append(cell(seeds(answers, "shares", label, "of_each", density=name, updates=n)))
        rows.append(row)
    exact = ["Fisher, t = 0.95, K = 512, exact velocity", ""]
    for name in gain.NAMES:
        exact += [cell(seeds(answers, "shares", "exact", "of_each", density=name, updates=n)) for n in shown]
    figure, axes = panels(
        len(gain.NAMES), "Q gained per KL paid, as a share of the optimum, against updates of the flow"
    )
    for ax, name in zip(axes, gain.NAMES):
        for label in DRAWN:
            points = {n: seeds(answers, "shares", label, "of_each", density=name, updates=n) for n in updates}
            band(ax, points, METRICS[label].title, label)
        ax.set(title=DENSITIES[name].title, ylim=(0, 1.03))
        count_updates(ax, updates)
        ax.axhline(1, color="#c9ced6", lw=0.8, zorder=0)
    legend(figure, axes[0])
    table = markdown(head, [*rows, exact])
    head = ["one multiplier for all states: trace-normalised, raw", *(DENSITIES[name].title for name in gain.NAMES)]
    rows = []
    for label in ("isotropic", "score", "covariance", "path", "pullback"):
        row = [METRICS[label].title]
        for name in gain.NAMES:
            shares = (
                seeds(answers, "shares", label, kind, density=name, updates=updates[-1])
                for kind in ("of_all", "of_all_raw")
            )
            row.append(", ".join(map(cell, shares)))
        rows.append(row)
    return f"{table}\n\nAfter {updates[-1]:,} updates:\n\n{markdown(head, rows)}", figure


def draw_kl(answers: Sequence[Answer]) -> tuple[str, Any]:
    updates = sorted({a["updates"] for a in answers})
    at = kl.BUDGETS.index(1e-2)
    head = ["metric"] + [
        f"{DENSITIES[name].title}, {n // 1000}k" for name in kl.NAMES for n in (updates[0], updates[-1])
    ]
    rows = []
    for label in kl.ASKED[1:]:
        row = [f"**{METRICS[label].title}**" if label == "pullback-mean" else METRICS[label].title]
        for name in kl.NAMES:
            for n in (updates[0], updates[-1]):
                row.append(cell(seeds(answers, "ratios", label, at, density=name, updates=n)))
        rows.append(row)
    last = updates[-1]
    budgets = markdown(
        [
            f"after {last:,} updates",
            *(f"{budget:g} nats" for budget in kl.BUDGETS),
            "power of the error",
            "folded at 0.1",
        ],
        [
            [f"{DENSITIES[name].title}: {METRICS[label].title}"]
            + [cell(seeds(answers, "shares", label, i, density=name, updates=last)) for i in range(len(kl.BUDGETS))]
            + [
                power(seeds(answers, "order", label, density=name, updates=last)),
                f"{max(seeds(answers, 'folded', label, 2, density=name, updates=last), default=0):.1%}",
            ]
            for name in kl.NAMES
            for label in ("isotropic", "score-mean", "pullback-mean")
        ],
    )
    figure, axes = panels(len(kl.NAMES), "Q gained at a true KL divergence of 0.01 nats, over what ‖δ‖² gains")
    for ax, name in zip(axes, kl.NAMES):
        for label in kl.ASKED:
            if label in DRAWN:
                points = {n: seeds(answers, "ratios", label, at, density=name, updates=n) for n in updates}
                band(ax, points, METRICS[label].title, label)
        ax.set_title(DENSITIES[name].title)
        count_updates(ax, updates)
        ax.set_ylim(bottom=0)
    legend(figure, axes[0])
    return markdown(head, rows) + "\n\n" + budgets, figure


def draw_settings(answers: Sequence[Answer]) -> tuple[str, Any]:
    names = [name for name in ("gaussian-2", "gaussian-6", "mixture", "ring") if seeds(answers, "seed", density=name)]
    updates = sorted({a["updates"] for a in answers})
    labels = dict.fromkeys(label for a in answers for label in a["values"])
    head = ["setting"] + [f"{DENSITIES[name].title}, {n // 1000}k" for name in names for n in updates]
    rows = [
        [label] + [cell(seeds(answers, "values", label, density=name, updates=n)) for name in names for n in updates]
        for label in labels
    ]
    rows.append(
        ["score's agreement with noise, E[s·b] / E[s·s]"]
        + [cell(seeds(answers, "calibration", density=name, updates=n)) for name in names for n in updates]
    )
    figure, axes = panels(
        len(names), "The time t: Gaussians by share of the optimum, the others by Q gained over ‖δ‖² at 0.01 nats"
    )
    for ax, name in zip(axes, names):
        for n, style in zip(updates, (":", "-")):
            for key, kind, suffix in (("score-mean", "score", "mean"), ("pullback-mean", "pullback", "steps=2")):
                times = [0.5, 0.7, 0.8, 0.9] + ([0.95, 0.98] if kind == "score" else [])
                points = {
                    t: seeds(answers, "values", f"{kind} t={t:g} {suffix}", density=name, updates=n) for t in times
                }
                title = "Fisher" if kind == "score" else "pull-back"
                band(ax, points, f"{title}, flow after {n:,} updates", key, linestyle=style)
        ax.set(title=DENSITIES[name].title, xlabel="t")
        ax.set_ylim(bottom=0)
    legend(figure, axes[0])
    return markdown(head, rows), figure


def draw_returns(answers: Sequence[Answer]) -> tuple[str, Any]:
    envs = [env for env in returns.ENVS if seeds(answers, "seed", env=env)]
    tables = []
    figure, axes = panels(len(envs), "Score of one sample against what its refinement costs in log-density", width=5.2)
    for ax, env in zip(axes, envs):
        rows = []
        for variant in returns.VARIANTS:
            points: dict[float, list[float]] = collections.defaultdict(list)
            falls: dict[float, list[float]] = collections.defaultdict(list)
            for a in answers:
                if (a["env"], a["variant"]) == (env, variant):
                    points[a["alpha"]].append(statistics.fmean(a["scores"]))
                    falls[a["alpha"]].append(a["fall"])
            where = {alpha: statistics.fmean(fall) for alpha, fall in falls.items()}
            band(ax, {where[alpha]: scores for alpha, scores in points.items()}, VARIANT_TITLES[variant], variant)
            for alpha in sorted(points):
                row = [VARIANT_TITLES[variant], f"{alpha:g}", f"{where[alpha]:.3f}", cell(points[alpha], 1)]
                chosen = [a for a in answers if (a["env"], a["variant"], a["alpha"]) == (env, variant, alpha)]
                row += [cell([a["gain"] for a in chosen]), f"{statistics.fmean(a['mean_square'] for a in chosen):.1e}"]
                rows.append(row)
        flow = [statistics.fmean(a["scores"]) for a in answers if (a["env"], a["variant"]) == (env, "flow")]
        ax.axhline(statistics.fmean(flow), color="#c9ced6", lw=1, zorder=0)
        ax.text(
            0.99,
            statistics.fmean(flow),
            "behaviour flow",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#8a8f98",
            transform=ax.get_yaxis_transform(),
        )
        ax.set(
            title=env,
            xscale="log",
            xlabel="nats lost: mean log p(a) − log p(a')",
            ylabel="normalised score",
        )
        head = [env, "α", "nats lost", "score of one sample", "Q gained", "‖δ‖²/d"]
        tables.append(markdown(head, rows))
    legend(figure, axes[0])
    return "\n\n".join(tables), figure


SECTIONS = {"gain": draw_gain, "kl": draw_kl, "settings": draw_settings, "returns": draw_returns}
