"""A policy on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fdkernels.policy import Acting, DisplacementPolicy, Policy, PolicyConfig, load_policy, save_policy
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("rule", ["sample", "best-of-n", "mean-flow-of-n"])
def test_it_acts_as_on_the_cpu(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DisplacementPolicy(PolicyConfig(actor_hidden=(64, 64), critic_hidden=(32, 32), flow_steps=3), 11, 3)
    save_policy(Policy(network, Acting(rule, 4, 0.5)), tmp_path / "policy.safetensors")  # type: ignore[arg-type]
    policy = load_policy(tmp_path / "policy.safetensors", device=DEVICE)
    obs, noise = torch.randn(5, 11), torch.randn(5, policy.acting.draws, 3)
    wanted = policy.acting(network, network.observe(obs), noise)
    found = policy.acting(policy.network, policy.network.observe(obs), noise.to(DEVICE))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)
    action, on_device = policy(obs.numpy()), policy(obs.to(DEVICE))
    assert isinstance(action, np.ndarray)
    assert on_device.device.type == DEVICE.type
    assert on_device.shape == action.shape == (5, 3)
