"""The agents' updates on a GPU: they match the published numbers, and CUDA graphs match plain updates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.device import DEVICE, on_gpu
from tests.published import Path as UpdatePath
from tests.published import Replay, mismatches
from train.agents import AGENTS
from train.agents.base import ALL_PARTS, Agent, Learner, Parts
from train.agents.seeds import SeedGroup
from train.capture import PLAIN_UPDATES, CapturedUpdate
from train.data.replay import Mixture
from train.data.replay import Replay as OnlineReplay
from train.data.synthetic import random_dataset
from train.data.transitions import OfflineDataset

pytestmark = on_gpu

# Factors on the tolerance, which is for float32 on a CPU, off by 1e-6; kernels may be off by 1e-5.
SLACK = {torch.float64: 1.0, torch.float32: 10.0}
CASES = [*AGENTS, "fidec pullback", "fidec cross"]
"""Names of agents, and of metrics that are not the default."""


@pytest.mark.parametrize("path", ["plain", "captured"])
@pytest.mark.parametrize("dtype", SLACK, ids=["float64", "float32"])
def test_matches_the_published_agent(golden: Path, dtype: torch.dtype, path: UpdatePath) -> None:
    with np.load(golden) as arrays:
        case = dict(arrays)
    exact = Replay(case, torch.float64).results
    problems = mismatches(case, Replay(case, dtype, path, DEVICE).results, dtype, exact=exact, slack=SLACK[dtype])
    assert not problems, "\n".join(problems)


class Training:
    """Plain or captured updates on random data, of one agent or of several seeds."""

    def __init__(self, name: str, num_seeds: int, *, captured: bool) -> None:
        self.data: OfflineDataset | OnlineReplay = random_dataset(500, 5, 3).to(DEVICE)
        self.agents = [self._agent(name, seed) for seed in range(num_seeds)]
        self.learner: Learner = self.agents[0] if num_seeds == 1 else SeedGroup(self.agents)
        self.optimizer = self.learner.make_optimizer()
        self.generators = [torch.Generator(DEVICE).manual_seed(seed) for seed in range(num_seeds)]
        self.call = CapturedUpdate(self.update, self.generators) if captured else self.update

    @staticmethod
    def _agent(name: str, seed: int) -> Agent:
        torch.manual_seed(seed)
        name, _, metric = name.partition(" ")
        small: dict[str, Any] = {"actor_hidden": (32, 32), "critic_hidden": (32, 32), "flow_steps": 3}
        if metric:
            small["metric"] = metric
        return AGENTS[name](AGENTS[name].hyperparameters(**small, freeze_flow_after=8), 5, 3).to(DEVICE)

    def update(self, parts: Parts, log: bool) -> dict[str, torch.Tensor]:
        batch, draws = self.learner.sample(self.data, 64, self.generators)
        seen = self.learner.update(self.optimizer, batch, draws, parts, log=log)
        # eigenvalues and sizes are not part of an update, and cannot be computed while a graph is recorded
        apart = ("score", "jacobian", "displacement")
        figures = self.learner.figures(batch, {name: tensor for name, tensor in seen.items() if name not in apart})
        return {f"{i}/{name}": figure for i, row in enumerate(figures) for name, figure in row.items()}

    def run(self) -> list[dict[str, torch.Tensor]]:
        """Both warm-ups with a changing learning rate, then updates of the agent, some of them logged."""
        logged = []
        for i in range(36):
            parts: Parts = ("flow",) if i < 8 else ("data_critic",) if i < 16 else self.learner.agent_parts(i - 16)
            for group in self.optimizer.param_groups:
                group["lr"].fill_(1e-3 / (1 + i % 8))
            log = i % 2 == 1
            figures = self.call(parts, log)
            if log:
                logged.append({name: figure.clone() for name, figure in figures.items()})
        return logged


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_replays_are_plain_updates(name: str, num_seeds: int) -> None:
    plain, captured = Training(name, num_seeds, captured=False), Training(name, num_seeds, captured=True)
    logged, logged_captured = plain.run(), captured.run()
    assert len(captured.call._graphs) == 8, "not a graph for each of four sets of losses, logged or not"
    for ours, theirs in zip(captured.generators, plain.generators):
        assert torch.equal(ours.get_state(), theirs.get_state()), "a resumed run would draw other numbers"
    for row, row_captured in zip(logged, logged_captured, strict=True):
        torch.testing.assert_close(row_captured, row, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(captured.agents, plain.agents):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_seeds_together_are_seeds_alone(name: str) -> None:
    together = Training(name, 3, captured=True)
    together.run()
    for seed, agent in enumerate(together.agents):
        alone = Training(name, 1, captured=False)
        alone.agents[0].load_state_dict(Training._agent(name, seed).state_dict())
        alone.generators[0].manual_seed(seed)
        alone.run()
        torch.testing.assert_close(dict(agent.state_dict()), dict(alone.agents[0].state_dict()), rtol=1e-3, atol=1e-4)


def test_replays_go_on_from_a_restored_state() -> None:
    training = Training("fidec", 1, captured=True)
    training.run()
    parts = training.learner.agent_parts(100)
    generator, agent = training.generators[0], training.agents[0]
    weights = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    moments = {p: {name: tensor.clone() for name, tensor in s.items()} for p, s in training.optimizer.state.items()}
    drawn = generator.get_state()
    for _ in range(5):
        training.call(parts, False)
    after = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    agent.load_state_dict(weights)
    for p, state in moments.items():
        for name, tensor in state.items():
            training.optimizer.state[p][name].copy_(tensor)
    generator.set_state(drawn)
    for _ in range(5):
        training.call(parts, False)
    torch.testing.assert_close(dict(agent.state_dict()), after, rtol=1e-5, atol=1e-6)


def go_online(training: Training, mixture: Mixture) -> None:
    """Updates offline, then one after each transition, whose number the rewards tell."""
    for _ in range(6):
        training.call(("critic", "actor"), False)
    training.data = replay = OnlineReplay(random_dataset(500, 5, 3).to(DEVICE), 30, mixture, 3, 0.99)
    if isinstance(training.call, CapturedUpdate):
        training.call.forget()
    generator = training.generators[0]
    replay.begin(torch.zeros(5, device=DEVICE))
    for i in range(30):
        # the agent acts in between, with noise from the generator that the graphs draw from
        noise = torch.randn(1, 3, generator=generator, device=DEVICE)
        action = training.agents[0].act(replay.state.unsqueeze(0), noise)[0]
        replay.add(action, torch.tensor(float(i)), 1.0, torch.full((5,), 0.1 * i, device=DEVICE))
        training.call(ALL_PARTS, False)


@pytest.mark.parametrize("mixture", ["all", "balanced"])
def test_graphs_see_what_is_added_between_them(mixture: Mixture) -> None:
    plain, captured = Training("fidec", 1, captured=False), Training("fidec", 1, captured=True)
    for training in (plain, captured):
        go_online(training, mixture)
    assert torch.equal(captured.generators[0].get_state(), plain.generators[0].get_state())
    assert torch.equal(captured.data.online.states, plain.data.online.states)
    torch.testing.assert_close(captured.data.online.actions, plain.data.online.actions, rtol=1e-3, atol=1e-4)
    ours, theirs = (dict(training.agents[0].state_dict()) for training in (captured, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


WAITS_FOR_THE_DEVICE = """
import torch
from train.capture import CapturedUpdate
update = CapturedUpdate(lambda parts, log: torch.ones(1, device="cuda").sum().item(), [])
for _ in range(4):
    print(update(("flow",), False))
"""


def test_what_cannot_be_recorded_says_so() -> None:
    # in its own process, because a failed recording makes a process unusable
    done = subprocess.run([sys.executable, "-c", WAITS_FOR_THE_DEVICE], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1.0"] * PLAIN_UPDATES
    assert "CaptureError: the update (flow) cannot be recorded as a CUDA graph" in done.stderr
    assert "--capture off runs it without graphs" in done.stderr
