"""The picture of a sweep: a row for each environment, a mark with an interval for each agent."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.agents import AGENTS
from train.outputs.curve import BLUE, GREEN, GREY, ORANGE, STYLE, png_of
from train.outputs.scores import Cell, Column, Scores

COLOURS = (BLUE, ORANGE, GREEN, "#8c4a9e", "#b8423f", "#4aa3a8", "#7a5c3a")
"""Of the agents, in the order of `AGENTS`. The flow alone is grey."""


def draw_scores(scores: Scores) -> bytes:
    """A PNG of the table: on the left the agents as they act, on the right one sample of each, if that is another."""
    rows = scores.rows()
    if "mean" in rows:
        rows = {"mean": rows.pop("mean"), **rows}
    panels = [
        (title, chosen)
        for title, role in (("as they act", "policy"), ("one sample", "sample"))
        if any(column.role == role for column in scores.columns)
        and (chosen := [i for i, column in enumerate(scores.columns) if column.role in (role, "flow")])
    ]
    height = max(0.3, 0.12 * max(len(chosen) for _, chosen in panels))
    with mpl.rc_context(STYLE):
        size = 2.5 + 5 * len(panels), 1.9 + height * len(rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
        for ax, (title, chosen) in zip(axes[0], panels):
            shifts = np.linspace(-0.3, 0.3, len(chosen)) if len(chosen) > 1 else np.zeros(1)
            for shift, i in zip(shifts, chosen):
                _draw_column(ax, scores.columns[i], [cells[i] for cells in rows.values()], shift)
            for y in range(0, len(rows), 2):
                ax.axhspan(y - 0.5, y + 0.5, color=GREY, alpha=0.08, linewidth=0)
            if "mean" in rows:
                ax.axhline(0.5, color=GREY, linewidth=1)
            ax.set_title(title, loc="left")
            ax.set_xlabel(scores.label)
            ax.grid(axis="x", alpha=0.25)
            ax.tick_params(axis="x", labeltop=len(rows) > 15)
            ax.tick_params(axis="y", length=0)
        axes[0, 0].set_yticks(range(len(rows)), list(rows))
        axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
        notes = "interquartile mean, 95 % interval, each seed"
        if not all(cell.is_final for cells in rows.values() for cell in cells):
            notes += "; open: not all trials have finished"
        figure.supxlabel(notes, fontsize=9, color=GREY)
        return png_of(figure, dpi=120)


def _draw_column(ax: Axes, column: Column, cells: Sequence[Cell], shift: float) -> None:
    """The marks of an agent, in all rows."""
    agents = list(AGENTS)
    cloning = column.role == "flow"
    colour = GREY if cloning else COLOURS[agents.index(column.agent) % len(COLOURS)]
    label = "behaviour cloning" if cloning else AGENTS[column.agent].title
    ax.plot([], [], "o", color=colour, label=label)
    shown = [(y + shift, cell, cell.middle) for y, cell in enumerate(cells) if cell.scores]
    if shown:
        at, _, middles = zip(*shown)
        low, high = zip(*(interval for _, interval in middles))
        ax.hlines(at, low, high, color=colour, linewidth=3, alpha=0.45)
    # of a mean over environments, single scores say nothing
    dots = [(score, y) for y, cell, _ in shown if len(cell.scores) == 1 for score in cell.scores[0]]
    if dots:
        ax.plot(*zip(*dots), ".", color=colour, markersize=4, alpha=0.4)
    for is_final, face in ((True, colour), (False, "white")):
        points = [(middle, y) for y, cell, (middle, _) in shown if cell.is_final == is_final]
        if points:
            ax.plot(*zip(*points), "o", color=colour, markerfacecolor=face, markersize=5)
