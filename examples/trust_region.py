"""Draw the Fisher trust region: ``python examples/trust_region.py`` writes docs/trust_region.png in a minute.

A state is an angle θ; its actions spread along the circle and hardly across it. A flow learns them, its scores give the
Fisher matrix of each state, and the script draws δᵀF̂δ/d ≤ c beside ‖δ‖²/d ≤ c.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

import fdkernels

SIZE = 0.006  # c, the size of the trust region
TIME = 0.8  # t of the score; closer to 1 the density is sharper, but t/(1 − t) amplifies the flow's errors
STATES = 7


def sample_data(theta: Tensor) -> Tensor:
    """Actions for angles (n,): 0.25 wide along the circle, 0.03 across."""
    along, across = 0.25 * torch.randn_like(theta), 0.6 + 0.03 * torch.randn_like(theta)
    cos, sin = theta.cos(), theta.sin()
    return torch.stack([across * cos - along * sin, across * sin + along * cos], dim=-1)


def observe(theta: Tensor) -> Tensor:
    return torch.stack([theta.cos(), theta.sin()], dim=-1)


def train_flow(updates: int = 4_000) -> fdkernels.VelocityMLP:
    flow = fdkernels.VelocityMLP(cond_dim=2, action_dim=2, hidden=(128, 128, 128))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        theta = 2 * math.pi * torch.rand(512)
        noise, data, t = torch.randn(512, 2), sample_data(theta), torch.rand(512, 1)
        loss = F.mse_loss(flow((1 - t) * noise + t * data, t, observe(theta)), data - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow


def main() -> None:
    torch.manual_seed(0)
    flow = train_flow()
    theta = 2 * math.pi * torch.arange(STATES) / STATES + 0.3
    _, score = fdkernels.flow_fisher_penalty(
        flow, observe(theta), torch.zeros(STATES, 2), num_samples=512, t=TIME, return_score=True
    )

    # the boundary: a unit circle of displacements, each scaled to have penalty SIZE
    turn = torch.linspace(0, 2 * math.pi, 200)
    circle = repeat(torch.stack([turn.cos(), turn.sin()]), "d turn -> state turn d", state=STATES)
    penalty = fdkernels.fisher_penalty(circle, repeat(score, "state k d -> state turn k d", turn=len(turn)))
    fisher_boundary = circle * rearrange((SIZE / penalty).sqrt(), "state turn -> state turn 1")
    isotropic_boundary = circle * (2 * SIZE) ** 0.5

    figure, ax = plt.subplots(figsize=(5.6, 5.6), layout="constrained")
    ax.plot(*sample_data(theta.repeat(400)).T, ".", color="#c9ced6", markersize=1.5, zorder=0)
    for i, angle in enumerate(theta):
        centre = 0.6 * torch.stack([angle.cos(), angle.sin()])
        first = i == 0
        ax.plot(
            *(centre + isotropic_boundary[i]).T, color="#d9822b", lw=1.4, ls="--", label="‖δ‖²/d" if first else None
        )
        ax.plot(*(centre + fisher_boundary[i]).T, color="#1f5fa8", lw=2.2, label="δᵀF̂δ/d" if first else None)
        ax.plot(*centre, "k.", markersize=4)
    ax.set_title("Trust regions of equal size in seven states", loc="left")
    ax.set_xlabel("action 1")
    ax.set_ylabel("action 2")
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center")
    path = Path(__file__).parents[1] / "docs" / "trust_region.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
