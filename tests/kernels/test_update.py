"""A whole update of the agents on a GPU: the published numbers, and replays of CUDA graphs equal to plain updates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.device import DEVICE, on_gpu
from tests.published import Path as UpdatePath
from tests.published import Replay, mismatches
from train.agents import AGENTS
from train.agents.base import Agent, Learner, Parts
from train.agents.hyperparameters import AgentConfig
from train.agents.seeds import SeedGroup
from train.capture import PLAIN_UPDATES, CapturedUpdate
from train.data.transitions import OfflineDataset
update = CapturedUpdate(lambda parts, log: torch.ones(1, device="cuda").sum().item(), [])
for _ in range(4):
    print(update(("flow",), False))
"""


def test_what_cannot_be_recorded_says_so() -> None:
    # in a process of its own, which a failed recording leaves unfit for more
    done = subprocess.run([sys.executable, "-c", WAITS_FOR_THE_DEVICE], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1.0"] * PLAIN_UPDATES
    assert "CaptureError: the update (flow) cannot be recorded as a CUDA graph" in done.stderr
    assert "--capture off runs it without graphs" in done.stderr
