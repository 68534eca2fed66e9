"""``train/run.py`` with NaN in one reward of the second seed's batch, at its twelfth update, in the last process.

test_processes.py starts it under torchrun.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from train import processes, run
from train.agents.base import Draws
from train.agents.seeds import SeedGroup
from train.data.transitions import Batch

updates = itertools.count(1)
sample = SeedGroup.sample


def spoilt(group: SeedGroup, *arguments: Any) -> tuple[Batch, Draws]:
    batch, draws = sample(group, *arguments)
    rank, total, _ = processes.place()
    if next(updates) == 12 and rank == total - 1:
        batch.rewards[1, -1] = torch.nan
    return batch, draws


if __name__ == "__main__":
    SeedGroup.sample = spoilt  # type: ignore[method-assign]
    sys.exit(run.main())
