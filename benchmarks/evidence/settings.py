"""What the settings of each metric are worth, on the Gaussians by the share of the optimum and elsewhere by true KL.

Beside it, a figure that an agent could compute from its own data, to see whether it tells a good metric from a bad one:
how well the score agrees with the noise that it estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fdkernels
from benchmarks.evidence import gain, kl
from benchmarks.evidence.densities import DENSITIES, observe
from benchmarks.evidence.flows import flow_of
from benchmarks.evidence.metrics import METRICS, Metric, pullback, score

TIMES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SAMPLES = (1, 4, 16, 64)
DAMPINGS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3)
SCORE_DAMPINGS = (1e-3, 1.0, 10.0, 100.0)


def settings() -> dict[str, Metric]:
    found = {}
    for t in TIMES:
        for k in SAMPLES:
            found[f"score t={t:g} K={k}"] = Metric(score(k, t))
        found[f"score t={t:g} mean"] = Metric(score(256, t, group=4))
        if t <= 0.9:
            for steps in (1, 2, 4):
                found[f"pullback t={t:g} steps={steps}"] = Metric(pullback(16, t, steps, group=2), local=True)
    for damping in SCORE_DAMPINGS:
        found[f"score damping={damping:g}"] = Metric(score(256, 0.95, damping=damping, group=4))
    for damping in DAMPINGS:
        found[f"pullback damping={damping:g}"] = Metric(pullback(16, damping=damping, group=2), local=True)
    for k in (1, 2, 4, 16):
        found[f"pullback K={k}"] = Metric(pullback(k), local=True)
    return found


def answer(name: str, updates: int, seed: int, data: Path) -> dict[str, Any]:
    flow, by_share = flow_of(name, updates, seed, data), name.startswith("gaussian")
    found = {"density": name, "updates": updates, "seed": seed, "calibration": calibration(name, flow)}
    if by_share:
        shares = gain.Question(name, seed)
        return {**found, "of": "share", "values": {k: shares.shares(m, flow)["of_each"] for k, m in settings().items()}}
    question = kl.Question(name, seed)
    base = kl.Bill(question, METRICS["isotropic"], flow).gain(0.01)
    local = {label: metric for label, metric in settings().items() if metric.local or "mean" in label}
    return {
        **found,
        "of": "ratio",
        "values": {label: kl.Bill(question, metric, flow).gain(0.01) / base for label, metric in local.items()},
    }


@torch.no_grad()
def calibration(name: str, flow: fdkernels.VelocityMLP, rows: int = 4096) -> float:
    """E[s·b] / E[s·s] at t = 0.95, with b = −x0/(1 − t): 1 for the true score, less for one with independent errors."""
    torch.manual_seed(1)
    density, angle = DENSITIES[name], 2 * math.pi * torch.rand(rows)
    obs, action = observe(angle), density.sample(angle)
    noise, t = torch.randn_like(action), 0.95
    view = (1 - t) * noise + t * action
    s = fdkernels.velocity_to_score(flow(view, torch.full_like(view[:, :1], t), obs), view, t)
    return ((s * -noise / (1 - t)).sum() / (s * s).sum()).item()


def tasks(data: Path, seed: int, updates: tuple[int, ...], quick: bool) -> Iterator[tuple[Path, Any, tuple[Any, ...]]]:
    for n in updates[1::2]:
        for name in ("gaussian-2", "gaussian-6", "mixture", "ring"):
            yield data / "settings" / f"{name}-{n}-seed{seed}.json", answer, (name, n, seed, data)
