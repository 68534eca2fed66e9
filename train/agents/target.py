"""Target networks."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← (1 − τ)·target + τ·source, all parameters in one launch."""
    get_ema_multi_avg_fn(1 - tau)(list(target.parameters()), list(source.parameters()), 0)
