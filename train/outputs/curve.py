"""Pictures: the learning curve of a run, the common curve of several seeds, and comparisons."""

from __future__ import annotations

import gc
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.agents import AGENTS
from train.outputs.diverged import Diverged
from train.outputs.files import write_whole
from train.outputs.record import read_table
from train.outputs.statistics import interquartile_mean
from train.settings import RunConfig, role_names

BLUE, GREEN, ORANGE, GREY, RED = "#1f5fa8", "#3a8f5c", "#d9822b", "#8a8f98", "#c0392b"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "axes.titlesize": 11,
}


def draw_curve(folder: Path, config: RunConfig, dataset_score: float, label: str) -> Path:
    """Draw ``folder/curve.png`` from the run's tables: the score against updates, and the agent's `panels` below it.

    Args:
        folder: the run's folder, with metrics.csv and evaluations.csv.
        config: the run's configuration.
        dataset_score: mean score of the dataset's own episodes.
        label: name of the score, for the axis.
    """
    evaluations = read_table(folder / "evaluations.csv")
    metrics = [row for row in read_table(folder / "metrics.csv") if row["stage"] in (config.agent, "online")]

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        axes = figure.subplot_mosaic([["score"] * 3, ["left", "middle", "right"]], height_ratios=[1.6, 1])
        _draw_score(axes["score"], evaluations, config, dataset_score, label)
        for ax, panel in zip((axes["left"], axes["middle"], axes["right"]), AGENTS[config.agent].panels):
            ax.set_title(panel.title, loc="left")
            for (column, text), colour in zip(panel.lines.items(), (BLUE, ORANGE, GREEN)):
                points = [(int(row["step"]) - warmups(config), float(row[column])) for row in metrics if row[column]]
                if points:
                    ax.plot(*zip(*points), color=colour, label=text, linewidth=1.6)
            if metrics and int(metrics[-1]["step"]) > config.offline_steps:
                _mark_online(ax, config.steps)
            if panel.target is not None:
                target = getattr(config.hyper, panel.target)
                ax.axhline(target, color=GREY, linestyle="--", linewidth=1, label="target")
            if panel.log_scale:
                ax.set_yscale("log")
            ax.set_xlabel("updates of the agent")
            if ax.lines:
                ax.legend(frameon=False, fontsize=9)
        return _save(figure, folder / "curve.png")


def _save(figure: Figure, path: Path) -> Path:
    """Write the picture whole, where a killed run would leave the upper part of one."""
    write_whole(path, png_of(figure, dpi=150))
    return path


def png_of(figure: Figure, dpi: int) -> bytes:
    """The finished figure as a picture, and its memory back."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    figure.clear()  # so that the caller, which holds it, does not hold the rest
    gc.collect()  # a figure is full of cycles, and Python would look for them only some ten figures and 57 MB later
    return content.getvalue()


def _draw_score(
    ax: Axes, evaluations: list[dict[str, str]], config: RunConfig, dataset_score: float, label: str
) -> None:
    for role, colour, text in _roles(config):
        rows = [row for row in evaluations if row["role"] == role]
        steps = [int(row["step"]) - config.flow_warmup for row in rows]
        mean, sem = ([float(row[c]) for row in rows] for c in ("score_mean", "score_sem"))
        ax.plot(steps, mean, color=colour, marker="o", markersize=4, linewidth=2, label=text)
        low, high = [m - s for m, s in zip(mean, sem)], [m + s for m, s in zip(mean, sem)]
        ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if int(evaluations[-1]["step"]) > config.offline_steps:
        _mark_online(ax, config.critic_warmup + config.steps)
    _finish_score(ax, f"{config.agent} on {config.env}, seed {config.seed}", config, dataset_score, label)


def _mark_online(ax: Axes, start: int) -> None:
    """Mark where online updates begin, in a plot that has some."""
    ax.axvline(start, color=GREY, linewidth=1)
    ax.text(start, 1, " online", transform=ax.get_xaxis_transform(), va="top", color=GREY, fontsize=9)


def _roles(config: RunConfig) -> list[tuple[str, str, str]]:
    colours = {"policy": BLUE, "sample": GREEN, "flow": ORANGE}
    return [(role, colours[role], name) for role, name in role_names(config).items()]


def warmups(config: RunConfig) -> int:
    """Number of updates before those of the whole agent."""
    return config.flow_warmup + config.critic_warmup


def _finish_score(ax: Axes, title: str, config: RunConfig, dataset_score: float, label: str) -> None:
    """Label the axes of a score plot, whose updates are counted from where the critics start to learn."""
    if config.critic_warmup:
        ax.axvspan(0, config.critic_warmup, color=GREY, alpha=0.1, linewidth=0, label="critics alone learn")
    ax.axhline(dataset_score, color=GREY, linestyle="--", linewidth=1.2, label="dataset's mean")
    ax.set_title(title, loc="left", fontsize=14)
    ax.set_ylabel(label.replace(" (", "\n("), fontsize=10)  # names of environments can be as long as the axis
    ax.set_xlabel("updates" + (f" (after {config.flow_warmup:,} of the flow alone)" if config.flow_warmup else ""))
    ax.margins(x=0.02)
    ax.grid(axis="y", alpha=0.25)
    ax.legend(frameon=False, loc="best")


def draw_comparison(
    path: Path,
    title: str,
    lines: Mapping[str, tuple[float, tuple[float, float], Sequence[float]]],
    dataset_score: float,
    label: str,
) -> None:
    """Draw a row for each way to act: the score of each seed, their interquartile mean and its interval.

    Args:
        path: file of the picture.
        title: its title.
        lines: maps each name to the interquartile mean, its interval, and the scores.
        dataset_score: mean score of the dataset's own episodes.
        label: name of the score, for the axis.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + 0.45 * len(lines)), layout="constrained")
        ax = figure.subplots()
        for y, (middle, (low, high), scores) in enumerate(lines.values()):
            ax.plot([low, high], [y, y], color=BLUE, linewidth=7, alpha=0.3, solid_capstyle="butt")
            ax.plot(scores, [y] * len(scores), "o", color=GREY, markersize=4)
            ax.plot([middle], [y], "|", color=BLUE, markersize=16, markeredgewidth=2.5)
            ax.annotate(f"{middle:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center")
        ax.axvline(dataset_score, color=GREY, linestyle="--", linewidth=1.2)
        ax.annotate(
            "dataset's mean", (dataset_score, 1.01), xycoords=("data", "axes fraction"), ha="center", color=GREY
        )
        ax.set_yticks(range(len(lines)), list(lines))
        ax.set_ylim(len(lines) - 0.5, -0.5)
        ax.set_xlabel(label)
        ax.set_title(title, loc="left", fontsize=14, pad=20)
        ax.grid(axis="x", alpha=0.25)
        _save(figure, path)


def draw_group_curve(
    config: RunConfig,
    evaluations: Sequence[Sequence[Mapping[str, Any]]],
    dataset_score: float,
    label: str,
    diverged: Sequence[Diverged] = (),
) -> Path:
    """Draw the scores of all seeds against updates: their interquartile mean with its interval, and a line per seed.

    Lines of seeds that diverged end in a cross. They are not part of the mean, at no step.

    Args:
        config: the group's configuration.
        evaluations: each seed's rows, as in its evaluations.csv, all at the same steps.
        dataset_score: mean score of the dataset's own episodes.
        label: name of the score, for the axis.
        diverged: the seeds that are not among these, with their own rows.
    """

    def line_of(rows: Sequence[Mapping[str, Any]], role: str) -> dict[int, float]:
        return {row["step"] - config.flow_warmup: row["score_mean"] for row in rows if row["role"] == role}

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), layout="constrained")
        ax = figure.subplots()
        for of_seed in diverged:
            for role, colour, _ in _roles(config):
                ended = line_of(of_seed.evaluations, role)
                ax.plot(list(ended), list(ended.values()), "--", color=colour, linewidth=0.7, alpha=0.45)
                ax.plot(list(ended)[-1:], list(ended.values())[-1:], "x", color=RED, markersize=7)
            ax.plot([], [], "x", color=RED, label=f"seed {of_seed.seed} diverged at update {of_seed.update:,}")
        for role, colour, text in _roles(config):
            lines = [line_of(rows, role) for rows in evaluations]
            steps = list(lines[0])
            for line in lines:
                ax.plot(steps, [line[step] for step in steps], color=colour, linewidth=0.7, alpha=0.45)
            middle = [interquartile_mean([line[step] for line in lines]) for step in steps]
            ax.plot(steps, [m for m, _ in middle], color=colour, marker="o", markersize=4, linewidth=2, label=text)
            low, high = zip(*(interval for _, interval in middle))
            ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        seeds = f"seeds {config.seed} to {config.seed + config.num_seeds - 1}"
        title = f"{config.agent} on {config.env}, {seeds}: interquartile mean, 95 % interval, each seed"
        _finish_score(ax, title, config, dataset_score, label)
        return _save(figure, config.group_curve)
