"""The scripts of ``examples/`` run, and their pages show what stands in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples import closed_form
from tests.examples.drop_ins import NAMES, named, script

REPOSITORY = Path(__file__).parents[2]
TINY: dict[str, dict[str, Any]] = {
    "torchrl_fql": {"width": 8, "flow_updates": 2, "critic_updates": 2, "actor_updates": 2},
    "reinflow": {"width": 8, "batch": 16, "flow_updates": 2, "iterations": 1, "epochs": 2},
    "robot_chunks": {"width": 16, "flow_updates": 2, "reward_updates": 2, "refine_updates": 2, "states": 16},
}


@pytest.mark.parametrize("name", named(TINY))
def test_an_experiment_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(closed_form, "ACTIONS", 32)
    module = script(name)
    closed_form.compare(lambda seed: module.experiment(seed, module.Config(**TINY[name])), 2)
    rows = capsys.readouterr().out.splitlines()
    contestants = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    assert contestants == ["", "---", "flow", *module.PENALTIES]


def test_a_perfect_policy_has_a_share_of_one() -> None:
    """Moving each density by a multiple of Σg, by its known parts. A step along g has the share that algebra says."""
    problem = closed_form.TURNING
    torch.manual_seed(0)

    def policy(towards: str) -> closed_form.Policy:
        def act(noise: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
            angle = torch.atan2(obs[:, 1], obs[:, 0])
            mean, axes, deviations = problem.behaviour.parts(angle)
            own = mean + (axes @ (deviations * noise).unsqueeze(-1)).squeeze(-1)
            step = problem.behaviour.covariance(angle) @ problem.g if towards == "best" else 0.05 * problem.g
            return own + (3 * step if towards != "nowhere" else 0)

        return act

    start = closed_form.judge(policy("nowhere"))
    assert abs(start.gain) < 0.01
    assert start.kl < 0.05  # of 256 draws for each state
    assert closed_form.judge(policy("best"), start).share == pytest.approx(1, abs=0.1)
    assert closed_form.judge(policy("g"), start).share == pytest.approx(0.42, abs=0.04)


def test_the_one_file_agent_trains_on_given_data(tmp_path: Path) -> None:
    corl = script("corl")
    world = corl.Corridor()
    torch.manual_seed(0)
    batch, returns, hit = world.rollouts(world.drive, 3)
    assert returns.shape == hit.shape == (3,)
    columns = ("observations", "actions", "rewards", "next_observations", "terminals")
    np.savez(tmp_path / "data.npz", **{name: column.numpy() for name, column in zip(columns, batch)})
    data = corl.load(tmp_path / "data.npz")
    np.savez(tmp_path / "less.npz", observations=batch.obs.numpy(), actions=batch.action.numpy())
    with pytest.raises(SystemExit, match=r"less.npz: lacks rewards, next_observations, terminals"):
        corl.load(tmp_path / "less.npz")
    agent = corl.Agent(3, 2, corl.Config(width=8, flow_updates=2, updates=2))
    before = {name: weight.clone() for name, weight in agent.named_parameters()}
    corl.train_flow(agent, data)
    corl.train(agent, data)
    moved = {name for name, weight in agent.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(before)
    assert agent.act(data.obs).abs().max() <= 1


@pytest.mark.long("trains the agents of one seed, at the size of the pages")
@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_what_each_penalty_did(name: str) -> None:
    module = script(name)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"examples.{name}", "--seeds", "1"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1200, check=True,
    ).stdout  # fmt: skip
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines() if row.startswith("|")]
    figures = {row[0]: row[1:] for row in rows[2:]}
    assert set(module.PENALTIES) < set(figures)
    assert all(re.match(r"-?\d", cell) for penalty in module.PENALTIES for cell in figures[penalty])


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_lines_of_its_script(name: str) -> None:
    page = (REPOSITORY / "docs" / "examples" / f"{name}.md").read_text()
    text = re.sub(r"\s+", "", (REPOSITORY / "examples" / f"{name}.py").read_text())
    diffs = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    assert diffs
    for sign in "+-":  # the scripts keep what is replaced, as the other choice of the penalty
        lines = [line[1:] for diff in diffs for line in diff.splitlines() if line.startswith(sign)]
        assert lines
        for line in lines:
            assert re.sub(r"\s+", "", line) in text, line
    assert f"python -m examples.{name}" in page


def test_reinflow_integrates_as_reinflow_does() -> None:
    """Steps of 1/K at the times linspace(0, 1, K), clipped each time."""
    module = script("reinflow")
    torch.manual_seed(0)
    flow, obs, start, steps = module.FlowMLP(16), torch.randn(5, module.OBS), torch.randn(5, module.ACT), 4
    with torch.no_grad():
        flow.net[-1].weight.mul_(20)  # so that clipping matters
    seen: list[float] = []
    flow.register_forward_pre_hook(lambda flow, args: seen.append(args[1].flatten()[0].item()))
    found = module.ReinFlow(flow, module.Config(steps=steps)).act(flow, start, obs)
    assert seen == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)
    expected = start
    for time in torch.linspace(0, 1, steps):
        expected = (expected + flow(expected, time.expand(5, 1), obs) / steps).clamp(-1, 1)
    torch.testing.assert_close(found, expected.detach())
    assert (found.abs() == 1).any()
