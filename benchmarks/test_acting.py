"""A robot's latency: from one observation in NumPy to one action in NumPy, 4×512 wide, ten steps.

    pytest benchmarks --benchmark-only -k acting

The noise is drawn beforehand, so that all contestants act the same. Agents compiled with CUDA graphs only take the
shapes that they were captured with; ours takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fdkernels_ref
from benchmarks.harness import DEVICE, ON_GPU, Entry, Outputs, Race, gate, normal, rotating
from benchmarks.peers.eager_agent import EagerAgent
from benchmarks.peers.parameters import parameters
from benchmarks.updates import CASES, Case
from train.agents.base import Agent

Act = Callable[[Tensor, Tensor], Tensor]
VARIANTS = ["eager", "eager, torch.compile", "ours"]
VARIANTS += ["eager, torch.compile with CUDA graphs"] if ON_GPU else []


def contestant(variant: str, case: Case, agent: Agent) -> Act:
    if variant == "ours":
        return agent.act
    eager = EagerAgent(case.agent, case.config, case.obs_dim, case.action_dim).to(DEVICE)
    eager.load_state_dict(parameters(agent))
    if variant == "eager":
        return eager.act
    return torch.compile(eager.act, mode="reduce-overhead" if "graphs" in variant else "default", dynamic=False)


def robot(act: Act, inputs: Sequence[tuple[np.ndarray, Tensor]]) -> Callable[[int], Outputs]:
    @torch.no_grad()
    def step(obs: np.ndarray, noise: Tensor) -> Outputs:
        action = act(torch.from_numpy(obs).to(DEVICE), noise).cpu().numpy()
        return {"action": torch.from_numpy(action)}

    return rotating(step, inputs)


def cases() -> list[Any]:
    found = []
    for case in CASES:
        for variant in VARIANTS:
            marks = []
            if "compile" in variant and case is not CASES[0]:
                marks = [pytest.mark.long("another agent's compilation is in")]
            found.append(pytest.param(variant, case, id=f"{variant}-{case}", marks=marks))
    return found


@pytest.mark.parametrize(("variant", "case"), cases())
def test_acting(race: Race, variant: str, case: Case) -> None:
    entry = Entry(
        op=f"{case.agent} acting", variant=variant, sizes={"rows": 1, "obs": case.obs_dim, "d": case.action_dim}
    )
    agent = case.start()
    inputs = [
        (normal(1, case.obs_dim, seed=2 * i).cpu().numpy(), normal(1, case.action_dim, seed=2 * i + 1))
        for i in range(8)
    ]
    exact = case.start().double()

    @torch.no_grad()
    def judge(i: int, outputs: Outputs) -> float:
        obs, noise = torch.from_numpy(inputs[i][0]).to(DEVICE).double(), inputs[i][1].double()
        start = noise
        if agent.refines:
            start = fdkernels_ref.integrate_flow(exact.flow, noise, obs, num_steps=case.config.flow_steps)
        action = exact.actor(torch.cat([obs, start], dim=-1)) + (start if agent.refines else 0)
        return gate(entry, outputs, {"action": action.clamp(-1, 1).cpu()})

    run, baseline = (robot(contestant(name, case, agent), inputs) for name in (variant, "eager"))
    race(entry, run, baseline, judge, inputs=len(inputs))
