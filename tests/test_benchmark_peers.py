"""The update's gate: the eager agent passes as it is, and fails with any change to its update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import updates
from benchmarks.harness import Entry, WrongResult
from benchmarks.peers.eager_agent import EagerAgent
from benchmarks.updates import Case, Eager, Ours, judge

ENTRY = Entry(op="update", variant="contestant", sizes={})
CASES = {name: Case(name, 5, 3) for name in ("fidec", "deflow", "fql")}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"WIDTH": 16, "HIDDEN": 2, "BATCH": 32, "TRANSITIONS": 512}.items():
        monkeypatch.setattr(updates, name, value)
    yield
    updates.dataset.cache_clear()
    updates.truth.cache_clear()


def verdict(contestant: Any, case: Case) -> float:
    for _ in range(updates.JUDGED_UPDATES):
        contestant.update()
    return judge(ENTRY, case, contestant.outcome())


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_ours_and_the_eager_agent_pass(case: Case) -> None:
    assert verdict(Ours(case, captured=False), case) < 1e-3
    assert verdict(Eager(case), case) < 1e-3


def with_settings(**changed: Any) -> Callable[[EagerAgent], None]:
    def change(agent: EagerAgent) -> None:
        agent.config = dataclasses.replace(agent.config, **changed)

    return change


def other_optimizer(agent: EagerAgent) -> None:
    agent.optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=3.3e-4)


@pytest.mark.parametrize(
    "change",
    [
        with_settings(tau=0.0051),
        with_settings(discount=0.98),
        with_settings(fisher_damping=0.1),
        with_settings(fisher_t=0.94),
        with_settings(score_convention="velocity"),
        with_settings(flow_steps=9),
        with_settings(grad_clip=None),
        with_settings(alpha=11.0, target_divergence=0.0),
        with_settings(q_aggregation="min"),
        other_optimizer,
    ],
    ids=["tau", "discount", "damping", "time", "score", "steps", "clip", "multiplier", "min", "lr"],
)
def test_a_changed_update_does_not_pass(change: Callable[[EagerAgent], None]) -> None:
    contestant = Eager(CASES["fidec"])
    change(contestant.agent)
    with pytest.raises(WrongResult, match="not worth timing"):
        verdict(contestant, CASES["fidec"])
