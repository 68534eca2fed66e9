"""What the presets for CPUs change for tasks that pay only at a goal.

Measured on pointmaze-medium-navigate-singletask-task1 with the flow of the quick preset (Intel Xeon, seed 0, ten
episodes after 1,500, 3,000, 4,500 and 6,000 updates of the critics): acting by the best of 16 flow actions reaches the
goal in 0, 0, 100 and 0 per cent of the episodes with the presets' targets of 10 rewards and γ = 0.99, and in 100, 60,
100 and 100 per cent with these. A goal is hundreds of steps away. One step towards it changes the value by less than
critics err; fifty, on which the data's action set out, change it by more.

For the same reason the agent's and the online targets sum as many rewards. With targets of one reward, all else equal,
the mean of 16 flow actions fell from 100 to 0 per cent within 1,000 online updates (AMD EPYC, seed 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ON_CPUS = {
    "scale_rewards": False,
    "critic_warmup_n_step": 50,
    "n_step": 50,
    "discount": 0.995,
    "freeze_critic_after": 0,
}
ONLINE_ON_CPUS = {"replay": "balanced"}
ON_POINT_MAZES = {"target_divergence": 1.0, "alpha": 3e-3, "freeze_critic_after": None}
"""A point goes wherever its action points. On that maze a displacement as large as an action takes one sample from 0 to
100 per cent if the critics follow it (AMD EPYC, seeds 0 to 2); with frozen ones it did on one seed. Within the usual
target of 1e-3 it changes nothing."""


def changes(task: str, preset: str, agent: str, online: bool) -> Mapping[str, Any]:
    if preset not in ("quick", "standard"):
        return {}
    point = ON_POINT_MAZES if task.startswith("pointmaze-") and agent in ("fidec", "deflow") else {}
    return {**ON_CPUS, **point, **(ONLINE_ON_CPUS if online else {})}
