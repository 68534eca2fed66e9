"""Updates of every agent in float64, for test_processes.py: alone, or in several processes under torchrun.

The first argument is the file to which the leader writes parameters and figures of all cases.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from tests.test_update import BATCH, Training, dataset, make
from tests.waiting import wait_for
from train import processes
from train.agents import AGENTS
from train.agents.base import Learner
from train.agents.seeds import SeedGroup

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    **{name: (name, {}, 1) for name in AGENTS},
    **{f"{name}, normalised Q": (name, {"normalize_q": True, "actor_layer_norm": True}, 1) for name in AGENTS},
    **{f"fidec, {metric}": ("fidec", {"metric": metric}, 1) for metric in ("cross", "pullback")},
    "fidec, random t": ("fidec", {"fisher_t_width": 0.1, "q_aggregation": "min"}, 1),
    **{f"{name}, three seeds": (name, {"normalize_q": True}, 3) for name in AGENTS},
    "fidec, three seeds, cross": ("fidec", {"metric": "cross"}, 3),
}
"""Agent, changed hyper-parameters, number of seeds."""


def states() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for title, (name, changes, seeds) in CASES.items():
        agents = [make(name, seed, **changes).double() for seed in range(seeds)]
        learner: Learner = agents[0] if seeds == 1 else SeedGroup(agents)
        figures = Training(learner, list(range(seeds)), dataset(torch.float64)).run(8)
        rows = len(range(BATCH)[processes.own_rows(BATCH)])
        means = [dict(zip(of_seed, processes.batch_means(list(of_seed.values()), rows))) for of_seed in figures]
        content = b"".join(p.detach().numpy().tobytes() for p in learner.state_dict().values())
        assert processes.agree(content), f"{title}: the processes have come apart"
        assert processes.place().total == 1 or not processes.agree(content + bytes([processes.place().rank]))
        found[title] = {"state": [dict(agent.state_dict()) for agent in agents], "figures": means}
    return found


def threads_named(name: str) -> list[str]:
    found = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text())
    return [thread for thread in found if name in thread]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.joined(on_gpus=False) as place:
        result = states()
        if place.leads:
            torch.save(result, sys.argv[1])
    wait_for(lambda: not threads_named("gloo"), "the group's threads may meet the end of Python")
