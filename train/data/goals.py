"""What the presets for CPUs change for tasks that pay only at a goal.

Measured on pointmaze-medium-navigate-singletask-task1 with the flow of the quick preset (Intel Xeon, seed 0, ten
episodes after 1,500, 3,000, 4,500 and 6,000 updates of the critics): acting by the best of 16 flow actions reaches the
goal in 0, 0, 100 and 0 per cent of the episodes with the presets' targets of 10 rewards and γ = 0.99, and in 100, 60,
100 and 100 per cent with these. A goal is hundreds of steps away, and differences in value must outlast the noise of
critics. They then stay those of the behaviour: critics that went on to learn with targets of one reward lost the way
again.
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
ONLINE_ON_CPUS = {"replay": "balanced", "online_lr": 3e-4}


def changes(preset: str, online: bool) -> Mapping[str, Any]:
    if preset not in ("quick", "standard"):
        return {}
    return {**ON_CPUS, **(ONLINE_ON_CPUS if online else {})}
