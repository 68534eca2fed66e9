"""Flows of the known densities, trained for various numbers of updates and kept for every question."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

import fdkernels
from benchmarks.evidence.densities import DENSITIES, observe

UPDATES = (1_000, 4_000, 10_000, 30_000)


def flow_of(name: str, updates: int, seed: int, folder: Path) -> fdkernels.VelocityMLP:
    """A 3×128 network after so many updates of Adam at 1e-3 with cosine annealing, batch 512."""
    density = DENSITIES[name]
    torch.manual_seed(seed)
    flow = fdkernels.VelocityMLP(cond_dim=2, action_dim=density.d, hidden=(128,) * 3)
    path = folder / "flows" / f"{name}-{updates}-seed{seed}.pt"
    if path.exists():
        flow.load_state_dict(torch.load(path, weights_only=True))
        return flow.requires_grad_(False)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        angle = 2 * math.pi * torch.rand(512)
        data = density.sample(angle)
        noise, t = torch.randn_like(data), torch.rand(512, 1)
        loss = F.mse_loss(flow((1 - t) * noise + t * data, t, observe(angle)), data - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(flow.state_dict(), partial)
    partial.rename(path)
    return flow.requires_grad_(False)
