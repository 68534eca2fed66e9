"""The contestants of a whole update, and the gate that checks that they agree.

All start from the same agent. The first updates of each are *judged*: they use the same batches and draws, and must
reach the parameters and Adam's moments of a float64 run. The float64 runs of our agent and the eager one must agree to
nine digits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, ON_GPU, Entry, WrongResult, gate
from benchmarks.peers.eager_agent import EagerAgent, ReplayBuffer
from benchmarks.peers.parameters import parameters
from train.agents import AGENTS
from train.agents.base import ALL_PARTS, Agent, Draws
from train.agents.hyperparameters import AgentConfig
from train.data.synthetic import random_dataset
from train.data.transitions import Batch, OfflineDataset

BATCH, WIDTH, HIDDEN, STEPS = 256, 512, 4, 10
TRANSITIONS = 2**20 if ON_GPU else 2**17
JUDGED_UPDATES = 5 if ON_GPU else 2  # three plain updates, the recorded one and a replay
COLUMNS = ("observations", "actions", "rewards", "next_observations", "masks")
GRADIENT_TOLERANCES = {"fp32": 1e-4, "tf32": 3e-2, "bf16": 3e-2}
"""For Adam's first moments, by network. Parameters get ten times as much, because Adam's steps are nearly signs."""

Outcome = dict[str, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    agent: str
    obs_dim: int
    action_dim: int
    num_samples: int | None = None
    """K; None for agents that draw no samples."""

    @property
    def config(self) -> AgentConfig:
        samples = {} if self.num_samples is None else {"num_fisher_samples": self.num_samples}
        hidden = (WIDTH,) * HIDDEN
        return AGENTS[self.agent].published_config(
            actor_hidden=hidden, critic_hidden=hidden, flow_steps=STEPS, **samples
        )

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"batch": BATCH, "obs": self.obs_dim, "d": self.action_dim}
        return sizes if self.num_samples is None else sizes | {"K": self.num_samples}

    def __str__(self) -> str:
        return "-".join([self.agent, *(f"{name}{size}" for name, size in self.sizes.items())])

    def start(self, seed: int = 0) -> Agent:
        """The agent that every contestant starts from. Its target network differs from the critic, so that a wrong
        target update shows."""
        torch.manual_seed(seed)
        agent = AGENTS[self.agent](self.config, self.obs_dim, self.action_dim)
        with torch.no_grad():
            for p in agent.target_critic.parameters():
                p.mul_(0.9)
        return agent.to(DEVICE)

    def flops(self) -> float:
        """Operations of an update's matrix products, such as FiDec's B·(20 + 11K) rows through the flow."""
        b, d, obs = BATCH, self.action_dim, self.obs_dim
        inner = (HIDDEN - 1) * WIDTH**2
        flow, actor, critic = (
            2 * (w * WIDTH + inner + WIDTH * out) for w, out in [(obs + d + 1, d), (obs + d, d), (obs + d, 1)]
        )
        integrated = AGENTS[self.agent].flow_evaluations(self.config, self.action_dim)
        # backward costs two forward passes, but only one for Q of the policy's actions, where it ends at the actions
        return b * (flow * (integrated + 3) + actor * (3 + 1) + 2 * critic * (3 + 1 + 2))


CASES = [Case("fidec", 17, 6, 4), Case("fidec", 29, 8, 8), Case("deflow", 17, 6), Case("fql", 17, 6)]


@functools.cache
def dataset(obs_dim: int, action_dim: int) -> OfflineDataset:
    return random_dataset(TRANSITIONS, obs_dim, action_dim).to(DEVICE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1 + seed)


def judged(case: Case, seed: int = 0) -> Iterator[tuple[Batch, Draws]]:
    """Batches and draws of the first updates, as our agent draws them."""
    agent, source = case.start(seed), generator(seed)
    data = dataset(case.obs_dim, case.action_dim)
    for _ in range(JUDGED_UPDATES):
        yield agent.sample(data, BATCH, [source])


# -- contestants -----------------------------------------------------------------------------------------------------


class Contestant(Protocol):
    """The first updates are the judged ones; later ones sample and draw for themselves."""

    def update(self) -> None: ...

    def outcome(self) -> Outcome: ...


class Ours:
    def __init__(
        self, case: Case, *, captured: bool, compiled: bool = False, flow_precision: Any = None, seed: int = 0
    ) -> None:
        agent = case.start(seed)
        if compiled:
            agent.compile(fullgraph=True, dynamic=False)
        agent.config = dataclasses.replace(agent.config, flow_precision=flow_precision)
        optimizer, source = agent.make_optimizer(), generator(seed)
        data = dataset(case.obs_dim, case.action_dim)

        def update(parts: Any, log: bool) -> dict[str, Tensor]:
            return agent.update(optimizer, *agent.sample(data, BATCH, [source]), parts, log=log)

        if captured:
            from train.capture import CapturedUpdate

            update = CapturedUpdate(update, [source])  # type: ignore[assignment]
        self.agent, self.optimizer, self._update = agent, optimizer, update

    def update(self) -> None:
        self._update(ALL_PARTS, False)

    def outcome(self) -> Outcome:
        return outcome_of(self.agent, self.optimizer)


class Eager:
    def __init__(self, case: Case, *, mode: str | None = None) -> None:
        self.agent = EagerAgent(case.agent, case.config, case.obs_dim, case.action_dim).to(DEVICE)
        self.agent.load_state_dict(parameters(case.start()))
        self.agent.make_optimizer()
        if mode is not None:
            self.agent.losses = torch.compile(self.agent.losses, mode=mode, dynamic=False)  # type: ignore[method-assign]
        data = dataset(case.obs_dim, case.action_dim)
        self.buffer = ReplayBuffer({name: getattr(data, name) for name in COLUMNS})
        self.feed = judged(case)

    def update(self) -> None:
        given = next(self.feed, None)
        if given is None:
            batch, draws = self.buffer.sample(BATCH), self.agent.draw(BATCH, DEVICE)
        else:
            batch, draws = map(as_dict, given)
        self.agent.update(batch, draws)

    def outcome(self) -> Outcome:
        return outcome_of_eager(self.agent)


class Jax:
    def __init__(self, case: Case, table: str) -> None:
        jax = pytest.importorskip("jax")
        # on a GPU its default is TF32; a CPU has float32 only
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if table == "tf32" else "highest")
        pytest.importorskip("flax")
        pytest.importorskip("optax")
        self.peer = importlib.import_module("benchmarks.peers.jax_agent")
        start = {name: p.cpu().numpy() for name, p in parameters(case.start()).items()}
        self.agent = self.peer.JaxAgent(case.agent, case.config, case.action_dim, start)
        data = dataset(case.obs_dim, case.action_dim)
        self.columns = {name: getattr(data, name).cpu().numpy() for name in COLUMNS}
        self.feed = judged(case)

    def update(self) -> None:
        import jax

        given = next(self.feed, None)
        if given is None:
            info = self.agent.update(self.peer.sample(self.columns, BATCH))
        else:
            batch, draws = ({name: t.cpu().numpy() for name, t in as_dict(columns).items()} for columns in given)
            info = self.agent.update_with(batch, draws | {"mse_noise": draws["base_noise"]})
        jax.block_until_ready((self.agent.state, info))

    def outcome(self) -> Outcome:
        found = self.agent.outcome()
        return {
            kind: {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
            for kind, arrays in found.items()
        }


def as_dict(columns: Batch | Draws) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in columns._asdict().items() if tensor is not None}


def outcome_of(agent: Agent, optimizer: torch.optim.Optimizer) -> Outcome:
    def moment(p: torch.nn.Parameter) -> Tensor:
        return optimizer.state[p]["exp_avg"] if p in optimizer.state else torch.zeros_like(p)

    return {"parameters": parameters(agent), "moments": parameters(agent, moment)}


def outcome_of_eager(agent: EagerAgent) -> Outcome:
    state = agent.optimizer.state
    moments = {name: state[p]["exp_avg"] for name, p in agent.named_parameters() if p in state}
    return {"parameters": dict(agent.state_dict()), "moments": moments}


# -- the gate --------------------------------------------------------------------------------------------------------


@functools.cache
def truth(case: Case, seed: int = 0) -> Outcome:
    """The outcome of the judged updates in float64, on which our agent and the eager one must agree."""
    ours = case.start(seed).double()
    optimizer = ours.make_optimizer()
    eager = EagerAgent(case.agent, case.config, case.obs_dim, case.action_dim).to(DEVICE).double()
    eager.load_state_dict(parameters(ours))
    eager.make_optimizer()
    for batch, draws in judged(case, seed):
        batch, draws = (type(c)(**{n: t.double() for n, t in as_dict(c).items()}) for c in (batch, draws))
        seen = ours.update(optimizer, batch, draws, ALL_PARTS, log=True)
        for name, loss in eager.update(as_dict(batch), as_dict(draws)).items():
            if not torch.isclose(loss, seen[name], rtol=1e-9, atol=1e-12):
                raise WrongResult(f"{case}: {name} is {loss.item()} in the eager agent, {seen[name].item()} in ours")
    found, theirs = outcome_of(ours, optimizer), outcome_of_eager(eager)
    for kind, arrays in theirs.items():
        for name, array in arrays.items():
            if not torch.allclose(array, found[kind][name], rtol=1e-9, atol=1e-12):
                raise WrongResult(f"{case}: {kind} {name} of the eager agent are not ours")
    return found


def by_network(outcome: Outcome, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each network, the moments and the movement of the parameters, each as one vector."""
    moved = {name: p.double().cpu() - start[name].double().cpu() for name, p in outcome["parameters"].items()}
    vectors = {}
    for kind, arrays in (("movement", moved), ("gradient moments", outcome["moments"])):
        networks = {name.split(".")[0] for name in arrays}
        if kind != "movement":
            networks.discard("target_critics")
        for network in sorted(networks):
            parts = [
                arrays[name].double().cpu().reshape(-1) for name in sorted(arrays) if name.split(".")[0] == network
            ]
            vectors[f"{kind} of {network}"] = torch.cat(parts)
    return vectors


def judge(entry: Entry, case: Case, outcome: Outcome, seed: int = 0) -> float:
    """The largest error in the outcome of the judged updates."""
    start = parameters(case.start(seed))
    right, found = by_network(truth(case, seed), start), by_network(outcome, start)
    tolerance = GRADIENT_TOLERANCES[entry.precision]
    # A parameter moves by a small part of its value, but float32 rounds the whole: log α to a thousandth of its step.
    sizes = by_network({"parameters": start, "moments": {}}, {name: torch.zeros_like(p) for name, p in start.items()})
    errors = []
    for name, vector in right.items():
        allowed = tolerance
        if name.startswith("movement"):
            rounding = 4 * torch.finfo(torch.float32).eps * sizes[name].norm() / vector.norm()
            allowed = 10 * tolerance + rounding.item()
        errors.append(gate(entry, found, {name: vector}, allowed))
    return max(errors)
