"""Join several groups of rows, with a condition for each row, and split the result again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(x0s: Sequence[Tensor], conds: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """All rows, (N, d), and the condition of each, (N, c); a condition broadcasts to its group's leading shape."""
    rows = torch.cat([x0.detach().reshape(-1, x0.shape[-1]) for x0 in x0s])
    spread = [c.detach().expand(*x0.shape[:-1], c.shape[-1]) for x0, c in zip(x0s, conds) if c is not None]
    return rows, torch.cat([c.reshape(-1, c.shape[-1]) for c in spread]) if spread else None


def split(rows: Tensor, x0s: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split rows (N, d) into the shapes of their groups, whose actions have d elements."""
    parts = rows.split([x0.numel() // rows.shape[-1] for x0 in x0s])
    return tuple(part.reshape(x0.shape) for part, x0 in zip(parts, x0s))
