"""An update's results, and that it gives the same ones when it is compiled or trains many seeds at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels
from fdkernels.cpu import layers as cpu_layers
from train.agents import AGENTS
from train.agents.base import ALL_PARTS, Agent, Learner, Parts
from train.agents.seeds import SeedGroup
from train.data.synthetic import random_dataset
from train.data.transitions import Batch, OfflineDataset
from train.health import sound, unsound
from train.outputs.checkpoint import read_checkpoint, save_checkpoint

OBS, ACTIONS, BATCH = 5, 3, 32
HIDDEN = {"actor_hidden": (16, 16), "critic_hidden": (16, 16)}
OTHER_METRICS = [("fidec", {"metric": metric}) for metric in ("cross", "pullback", "isotropic")]
SMALL: dict[str, Any] = {**HIDDEN, "flow_steps": 3, "num_fisher_samples": 2, "grad_clip": 0.5, "freeze_flow_after": 4}


def make(name: str, seed: int = 0, **changes: object) -> Agent:
    torch.manual_seed(seed)
    kind = AGENTS[name]
    return kind(kind.hyperparameters(**{**SMALL, **changes}), OBS, ACTIONS)


def dataset(dtype: torch.dtype = torch.float32) -> OfflineDataset:
    return random_dataset(200, OBS, ACTIONS, dtype)


class Training:
    """A learner on random data, with a generator for each seed."""

    def __init__(self, learner: Learner, seeds: list[int], data: OfflineDataset) -> None:
        self.learner, self.data = learner, data
        self.optimizer = learner.make_optimizer()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def run(self, updates: int, start: int = 0) -> list[dict[str, Tensor]]:
        """One warm-up update of the flow, one of the critics, then the agent's; returns the last update's figures."""
        for i in range(start, start + updates):
            parts: Parts = ("flow",) if i == 0 else ("data_critic",) if i == 1 else self.learner.agent_parts(i - 2)
            batch, draws = self.learner.sample(self.data, BATCH, self.generators)
            seen = self.learner.update(self.optimizer, batch, draws, parts, log=True)
        return self.learner.figures(batch, seen)


def assert_same(ours: Agent, theirs: Agent, **tolerance: float) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **tolerance)


# -- what it computes ----------------------------------------------------------------------------------------------


class CountedFlow(fdkernels.VelocityMLP):
    """Counts the rows that it evaluates."""

    rows = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows += x[..., 0].numel()
        return super().forward(x, t, cond)


@pytest.mark.parametrize(
    ("name", "per_state"),
    # fidec: twice ten steps, one row of flow matching, and for each of K samples ten steps and the score
    [("fidec", lambda k: 21 + 11 * k), ("deflow", lambda k: 21), ("fql", lambda k: 11)],
)
@pytest.mark.parametrize("log", [False, True])
def test_rows_of_the_velocity_network(name: str, per_state, log: bool) -> None:
    for k in (1, 4):
        agent = make(name, flow_steps=10, num_fisher_samples=k)
        agent.flow = CountedFlow(OBS, ACTIONS, (8,))
        batch, draws = agent.sample(dataset(), BATCH, [torch.Generator()])
        agent.update(agent.make_optimizer(), batch, draws, log=log)
        assert agent.flow.rows == BATCH * per_state(k)


def test_nothing_is_computed_for_a_log_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, asked = make("fidec"), []
    penalty = fdkernels.flow_fisher_penalty

    def noted(*args, return_score: bool, **kwargs):
        asked.append(return_score)
        return penalty(*args, return_score=return_score, **kwargs)

    monkeypatch.setattr(fdkernels, "flow_fisher_penalty", noted)
    batch, draws = agent.sample(dataset(), BATCH, [torch.Generator()])
    assert agent.update(agent.make_optimizer(), batch, draws) == {}
    assert "score" in agent.update(agent.make_optimizer(), batch, draws, log=True)
    assert asked == [False, True]


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in AGENTS), *OTHER_METRICS])
def test_logging_changes_nothing(name: str, changes: dict[str, object]) -> None:
    quiet, logged = (make(name, **changes).double() for _ in range(2))
    batch, draws = quiet.sample(dataset(torch.float64), BATCH, [torch.Generator()])
    for agent, log in ((quiet, False), (logged, True)):
        agent.update(agent.make_optimizer(), batch, draws, log=log)
    assert_same(quiet, logged, rtol=1e-9, atol=1e-12)


def test_the_critic_and_the_flow_get_no_gradient_from_the_actor() -> None:
    agent = make("fidec")
    batch, draws = agent.sample(dataset(), BATCH, [torch.Generator()])
    agent.backward(batch, draws, ("actor",))
    assert all(p.grad is None for module in (agent.critic, agent.flow) for p in module.parameters())
    assert all(p.grad is not None for p in agent.actor.parameters())


def test_flow_precision_is_that_of_the_integration_alone() -> None:
    exact, rough = make("fidec"), make("fidec", flow_precision="bf16")
    batch, draws = exact.sample(dataset(), BATCH, [torch.Generator()])
    ours, theirs = (agent.backward(batch, draws, log=True) for agent in (rough, exact))
    for name in ("base_actions", "next_actions"):
        error = (ours[name] - theirs[name]).abs().max()
        assert 0 < error < 0.02, f"{name} off by {error}"
    for name in ("flow_loss", "predicted_velocity", "critic_q"):
        assert torch.equal(ours[name], theirs[name]), name


def test_importable_with_torch_alone() -> None:
    """GPU machines for tests and benchmarks have little more."""
    hidden = ("tyro", "gymnasium", "minari", "mujoco", "safetensors", "matplotlib", "scipy", "tensorboard", "tqdm")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\nimport train.agents.seeds, train.capture"
    code += "\nimport train.profiling, tests.published"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.long("half a minute of C++ to compile")
def test_compiled_losses_are_the_losses() -> None:
    """With inductor; the parity tests trace all three agents."""
    torch.compiler.reset()
    plain, compiled = (make("fidec", flow_steps=1, critic_hidden=(8,)).double() for _ in range(2))
    compiled.compile(fullgraph=True, dynamic=False)
    data = dataset(torch.float64)
    ours, theirs = (Training(agent, [3], data).run(2, start=2) for agent in (compiled, plain))
    assert_same(compiled, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# -- many seeds ----------------------------------------------------------------------------------------------------

SEEDS = [4, 0, 9]


@pytest.mark.parametrize("processor", ["multiplies apart", "multiplies batches"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in AGENTS),
        *((name, {"actor_layer_norm": True, "fisher_t_width": 0.1, "normalize_q": True}) for name in AGENTS),
        *OTHER_METRICS,
        ("fidec", {"metric": "pullback", "actor_layer_norm": True, "pullback_steps": 1, "normalize_q": True}),
    ],
)
def test_seeds_together_are_seeds_alone(
    name: str, changes: dict[str, object], processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(torch.float64)
    agents = [make(name, seed, **changes).double() for seed in SEEDS]
    with monkeypatch.context() as chosen:
        chosen.setattr(cpu_layers, "multiplies_apart", lambda rows: processor == "multiplies apart")
        figures = Training(SeedGroup(agents), SEEDS, data).run(8)
    for seed, together, figures_together in zip(SEEDS, agents, figures, strict=True):
        alone = make(name, seed, **changes).double()
        (figures_alone,) = Training(alone, [seed], data).run(8)
        assert_same(together, alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(figures_together, figures_alone, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(agents[0].flow.net[0].weight, agents[1].flow.net[0].weight)


def test_gradients_are_clipped_seed_by_seed() -> None:
    agents = [make("deflow", seed, grad_clip=1.0) for seed in range(2)]
    group = SeedGroup(agents)
    batch, draws = group.sample(dataset(), BATCH, [torch.Generator().manual_seed(seed) for seed in range(2)])
    batch = batch._replace(rewards=batch.rewards * torch.tensor([[1e4], [1.0]]))
    group.backward(batch, draws)
    before = [p.grad.clone() for p in group.parameters() if p.grad is not None]
    group.clip_gradients(1e3, group.gradient_norms())
    after = [p.grad for p in group.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) if g.ndim > 1 else g.abs() for g in after]).norm(dim=0)
    assert norms[0] == pytest.approx(1e3, rel=1e-4)
    assert norms[1] < 1e3
    assert all(torch.equal(a[1], b[1]) for a, b in zip(after, before))


@pytest.mark.parametrize("processor", ["multiplies apart", "multiplies batches"])
@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in AGENTS), ("fidec", {"metric": "pullback"})])
def test_a_seed_that_is_left_out_touches_no_other(
    name: str, changes: dict[str, object], processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, while all its numbers are NaN; its own parameters stay as they were."""
    monkeypatch.setattr(cpu_layers, "multiplies_apart", lambda rows: processor == "multiplies apart")

    def trained(lost: int | None) -> tuple[list[Agent], Training, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        agents = [make(name, seed, **changes) for seed in SEEDS]
        group = SeedGroup(agents)
        training = Training(group, SEEDS, dataset())
        training.run(4)
        for i in range(2, 6):
            batch, draws = group.sample(training.data, BATCH, training.generators)
            if lost is not None:
                batch.observations[lost] = batch.rewards[lost] = torch.nan
            seen = group.backward(batch, draws, group.agent_parts(i), log=True)
            if i == 2 and lost is not None:
                assert unsound(sound(group.losses, group.gradient_norms())) == [lost]
                group.leave_out(lost, training.optimizer)
                before = [{name: tensor.clone() for name, tensor in agents[lost].named_parameters()}]
            norms = group.gradient_norms()
            assert norms.isfinite().all()
            group.step(training.optimizer, group.agent_parts(i), norms)
        return agents, training, group.figures(batch, seen), before if lost is not None else []

    plain, of_plain, figures, _ = trained(None)
    others, of_others, others_figures, (before,) = trained(1)
    for i in (0, 2):
        assert_same(others[i], plain[i], rtol=0, atol=0)
        torch.testing.assert_close(others_figures[i], figures[i], rtol=0, atol=0)
        states = (t.learner.optimizer_of(i, t.optimizer).state_dict()["state"] for t in (of_others, of_plain))
        torch.testing.assert_close(*states, rtol=0, atol=0)
    assert others_figures[1] == {}
    learning = {name for name in before if not name.startswith("target_critic")}
    assert all(torch.equal(dict(others[1].named_parameters())[name], before[name]) for name in learning)


@pytest.mark.parametrize("name", AGENTS)
def test_a_seed_goes_on_alone_and_a_group_from_seeds(name: str, tmp_path: Path) -> None:
    data = dataset(torch.float64)
    agents = [make(name, seed).double() for seed in SEEDS]
    group = SeedGroup(agents)
    together = Training(group, SEEDS, data)
    together.run(5)
    paths = []
    for i, agent in enumerate(agents):
        optimizer = group.optimizer_of(i, together.optimizer)
        paths.append(save_checkpoint(tmp_path / str(i), 5, agent, optimizer, together.generators[i], {}))
    together.run(4, start=5)

    resumed_agents = [make(name, 77).double() for _ in SEEDS]
    resumed_group = SeedGroup(resumed_agents)
    resumed = Training(resumed_group, [1, 2, 3], data)
    for i, path in enumerate(paths):
        alone = make(name, 78).double()
        training = Training(alone, [5], data)
        read_checkpoint(path).restore(alone, training.optimizer, training.generators[0])
        training.run(4, start=5)
        assert_same(alone, agents[i], rtol=1e-9, atol=1e-12)
        optimizer = resumed_group.optimizer_of(i, resumed.optimizer)
        read_checkpoint(path).restore(resumed_agents[i], optimizer, resumed.generators[i])
    resumed.run(4, start=5)
    for ours, theirs in zip(resumed_agents, agents):
        assert_same(ours, theirs, rtol=0, atol=0)


def test_batches_are_those_of_the_seed_alone() -> None:
    data = dataset()
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    batch, draws = SeedGroup([make("fidec", seed) for seed in SEEDS]).sample(data, BATCH, generators)
    assert isinstance(batch, Batch)
    for i, seed in enumerate(SEEDS):
        alone, drawn_alone = make("fidec").sample(data, BATCH, [torch.Generator().manual_seed(seed)])
        for ours, theirs in zip((*batch, *draws), (*alone, *drawn_alone)):
            assert (ours is None and theirs is None) or torch.equal(ours[i], theirs)


@pytest.mark.parametrize("parts", [ALL_PARTS, ("flow",), ("critic", "actor")])
@pytest.mark.parametrize("name", AGENTS)
def test_flows_integrated_together_are_those_of_each_seed(name: str, parts: Parts) -> None:
    """Here vmap stands for the one launch on a GPU; the CPU integrates seed by seed."""
    group = SeedGroup([make(name, seed).double() for seed in SEEDS])
    batch, draws = group.sample(dataset(torch.float64), BATCH, [torch.Generator().manual_seed(seed) for seed in SEEDS])
    apart, together = group.integrate(batch, draws, parts), group.integrate_together(batch, draws, parts)
    assert apart.keys() == together.keys()
    for key in apart:
        torch.testing.assert_close(together[key], apart[key], rtol=1e-9, atol=1e-12)
