"""The updates of eight seeds: one after the other, and together with batched weights.

    pytest benchmarks --benchmark-only --long -k seeds     # on a CPU; without --long on a GPU

Each seed must end up where its own float64 run does.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness import ON_GPU, Entry, Race, precision
from benchmarks.updates import BATCH, CASES, JUDGED_UPDATES, Case, Ours, dataset, generator, judge, outcome_of
from train.agents.base import ALL_PARTS
from train.agents.seeds import SeedGroup

SEEDS = 8
CASE = CASES[0]
KIND = "tf32" if ON_GPU else "fp32"


class OneByOne:
    """Our agents, one per seed, updated one after the other."""

    def __init__(self, case: Case, seeds: int) -> None:
        self.agents = [Ours(case, captured=ON_GPU, seed=seed) for seed in range(seeds)]

    def update(self) -> None:
        for agent in self.agents:
            agent.update()

    def outcomes(self) -> list[Any]:
        return [agent.outcome() for agent in self.agents]


class Together:
    def __init__(self, case: Case, seeds: int) -> None:
        self.group = SeedGroup([case.start(seed) for seed in range(seeds)])
        self.optimizer = self.group.make_optimizer()
        sources = [generator(seed) for seed in range(seeds)]
        data = dataset(case.obs_dim, case.action_dim)

        def update(parts: Any, log: bool) -> Any:
            return self.group.update(self.optimizer, *self.group.sample(data, BATCH, sources), parts, log=log)

        self._update = update
        if ON_GPU:
            from train.capture import CapturedUpdate

            self._update = CapturedUpdate(update, sources)

    def update(self) -> None:
        self._update(ALL_PARTS, False)

    def outcomes(self) -> list[Any]:
        agents = enumerate(self.group.agents)
        return [outcome_of(agent, self.group.optimizer_of(i, self.optimizer)) for i, agent in agents]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if ON_GPU else [pytest.mark.long("eight updates take seconds on a CPU")])
        for name in ("one after the other", "ours, together", "ours, one seed alone")
    ],
)
def test_seeds(race: Race, variant: str) -> None:
    entry = Entry(
        op="eight seeds of fidec, one update each",
        variant=variant,
        sizes=CASE.sizes,
        precision=KIND,
        baseline_variant="one after the other",
        baseline_precision=KIND,
        flops=CASE.flops() * (1 if "alone" in variant else SEEDS),
    )
    with precision(KIND):
        contestant: Any = {
            "one after the other": lambda: OneByOne(CASE, SEEDS),
            "ours, together": lambda: Together(CASE, SEEDS),
            "ours, one seed alone": lambda: OneByOne(CASE, 1),
        }[variant]()
        baseline = OneByOne(CASE, SEEDS)

        def judge_first_updates(i: int, outputs: None) -> float:
            for _ in range(JUDGED_UPDATES - 1):
                contestant.update()
            return max(judge(entry, CASE, outcome, seed) for seed, outcome in enumerate(contestant.outcomes()))

        race(entry, lambda i: contestant.update(), lambda i: baseline.update(), judge_first_updates, stateful=True)
