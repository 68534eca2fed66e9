"""Draw what metrics call equally far: ``python examples/trust_region.py`` writes docs/trust_region.png in some minutes.

Flows learn four densities. At some actions of each, the picture shows the displacements that a metric calls equally
far, and the one among them that climbs Q fastest, for Q(a) = g·a with the same g everywhere. The size of each metric's
trust region is such that all refinements pay the same true KL divergence (``benchmarks/evidence/kl.py``).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.evidence.flows import flow_of
from benchmarks.evidence.kl import Bill, Question
from benchmarks.evidence.metrics import METRICS

ROWS = {
    "isotropic": ("‖δ‖²", "#8a8f98"),
    "score-mean": ("Fisher matrix of the state", "#d9822b"),
    "pullback-mean": ("pull-back at the action", "#1f5fa8"),
}
DENSITIES = ("gaussian-2", "ring", "moons", "mixture")
BUDGET = 0.1  # nats
LONGER = 2.5  # regions and steps are drawn so many times as large, to be seen
UPDATES = 10_000
G = torch.tensor([0.0, 1.0], dtype=torch.float64)
ANGLE = 0.6
ROOT = Path(__file__).parents[1]


def spread(points: Tensor, count: int) -> Tensor:
    """Indices of points that lie far from one another, by farthest-point sampling."""
    chosen = [0]
    for _ in range(count - 1):
        distance = torch.cdist(points, points[chosen]).amin(1)
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def draw_density(ax: Axes, question: Question) -> None:
    low, high = question.action.amin(0), question.action.amax(0)
    centre, reach = (low + high) / 2, (high - low).max().item() / 2 + 0.1
    side = torch.linspace(-reach, reach, 241, dtype=torch.float64)
    grid = centre + torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    density = question.density.log_prob(question.angle[:1].expand(len(grid)), grid).exp().reshape(241, 241)
    (x, y) = centre.tolist()
    box = (x - reach, x + reach, y - reach, y + reach)
    ax.imshow(density.sqrt(), extent=box, origin="lower", cmap="Greys", alpha=0.5)
    ax.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[])


def draw_regions(ax: Axes, bill: Bill, at: Tensor, colour: str) -> None:
    c = bill.scale(BUDGET)
    delta = LONGER * c * bill.delta[at, :, 0]
    size = LONGER * c * (bill.question.g * bill.delta)[..., 0].sum(1).mean().sqrt()
    turn = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    circle = torch.stack([turn.cos(), turn.sin()])
    for action, matrix, step in zip(bill.question.action[at], bill.matrix[at], delta):
        values, vectors = torch.linalg.eigh(matrix)
        ellipse = size * (vectors / values.sqrt()) @ circle
        ax.plot(*(action.unsqueeze(1) + ellipse), color=colour, lw=1.3)
        ax.annotate(
            "",
            action + step,
            action,
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#c0292b",
                "lw": 1.3,
                "mutation_scale": 8,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        ax.plot(*action, ".", color="#1f2937", ms=3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what metrics call equally far, and their steps. Takes minutes.")
    path = ROOT / "docs" / "trust_region.png"
    parser.add_argument("--out", type=Path, default=path, help="the picture (default: docs/trust_region.png)")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    figure, axes = plt.subplots(len(ROWS), len(DENSITIES), figsize=(11, 8.6), layout="constrained")
    for column, name in enumerate(DENSITIES):
        flow, question = flow_of(name, UPDATES, 0, ROOT / "runs" / "science"), Question(name, 0, angle=ANGLE, g=G)
        at, base = spread(question.action[:100], 10), 0.0
        for row, (label, (title, colour)) in enumerate(ROWS.items()):
            ax, bill = axes[row, column], Bill(question, METRICS[label], flow)
            base = base or bill.gain(BUDGET)
            draw_density(ax, question)
            draw_regions(ax, bill, at, colour)
            ax.text(
                0.03,
                0.03,
                f"Q gained: {bill.gain(BUDGET) / base:.1f}×",
                transform=ax.transAxes,
                fontsize=10,
                bbox={"fc": "white", "ec": "none", "pad": 2, "alpha": 0.8},
            )
            for spine in ax.spines.values():
                spine.set_color("#c9ced6")
            if row == 0:
                ax.set_title(question.density.title, fontsize=11)
            if column == 0:
                ax.set_ylabel(title, fontsize=11, color=colour)
    title = (
        f"What a metric calls equally far, and its step towards Q = a₂; all pay {BUDGET} nats of KL (drawn {LONGER}×)"
    )
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
