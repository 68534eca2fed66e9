"""The presets of ``--preset``: settings that were measured to work together.

A preset's settings are those in `PRESETS`, with `ONLINE` if the run goes online, then the agent's changes
(`Agent.presets`), then the environment's (`EnvSpec.preset_changes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import tyro

from train.agents import AGENTS
from train.agents.base import Agent
from train.environments import ENVIRONMENTS
from train.settings import RunConfig

# Measured on two CPU cores. The flow is trained first and then frozen: everything depends on how faithful it is. Next
# come critics of the behaviour, whose targets sum ten rewards; then displacement and critics together.
QUICK: Mapping[str, Any] = {
    "steps": 2_000,
    "flow_warmup": 30_000,
    "critic_warmup": 6_000,
    "critic_warmup_n_step": 10,
    "anneal": True,
    "acting": "mean-flow-of-n",
    "acting_samples": 16,
    "acting_temperature": 0.006,
    "eval_every": 1_000,
    "eval_episodes": 20,
    "interim_episodes": 5,
    "log_every": 100,
    "checkpoint_every": 5_000,
    "standardize_observations": True,
    "scale_rewards": True,
    "center_critics": True,
    "actor_hidden": (256,) * 3,
    "critic_hidden": (256,) * 2,
    "lr": 1e-3,
    "normalize_q": True,
    "flow_steps": 5,
    "freeze_flow_after": 0,
    "fisher_t": 0.8,
    "num_fisher_samples": 2,
    "zero_init_displacement": True,
    "alpha": 1.0,
    "target_divergence": 1e-3,
}
LONGER = {"steps": 10_000, "flow_warmup": 60_000, "critic_warmup": 10_000, "eval_every": 2_500}
PRESETS: dict[str, Mapping[str, Any]] = {"quick": QUICK, "standard": {**QUICK, **LONGER}, "full": {}}
"""The run settings and hyper-parameters of each preset; those not listed have their published values."""
ONLINE: dict[str, Mapping[str, Any]] = {"quick": {"online_lr": 3e-4}, "standard": {"online_lr": 3e-4}}
"""What a run that goes online has besides."""


def choose_preset(name: str, device: str) -> str:
    """Resolve ``auto``: full on a GPU, quick without one."""
    if name != "auto":
        return name
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "full" if on_gpu else "quick"


def preset_config(name: str, agent: str, env: str | None, online_steps: int = 0) -> RunConfig:
    """The settings of ``--preset quick``, ``standard`` and ``full``; unknown names change nothing.

    Runs with ``online_steps`` have some settings that others refuse.
    """
    kind = AGENTS.get(agent, Agent)
    online = online_steps > 0
    settings = {**PRESETS.get(name, {}), **(ONLINE.get(name, {}) if online else {}), **kind.presets.get(name, {})}
    if env in ENVIRONMENTS:
        settings |= ENVIRONMENTS[env].preset_changes(name, agent, online)
    settings["online_steps"] = online_steps
    of_run = {field.name for field in dataclasses.fields(RunConfig)} & settings.keys()
    hyper = kind.published_config(**{name: value for name, value in settings.items() if name not in of_run})
    return RunConfig(env=tyro.MISSING, hyper=hyper, **{name: settings[name] for name in of_run})


def preset_table(agent: str, env: str | None, online_steps: int = 0) -> str:
    """The settings in which the presets differ, a line for each."""
    configs = [preset_config(preset, agent, env, online_steps) for preset in PRESETS]
    of_run = [field.name for base in RunConfig.__bases__ for field in dataclasses.fields(base)]  # as the help has them
    names = [*(name for name in of_run if name != "hyper"), *vars(configs[0].hyper)]
    lines = [f"  {'':26}" + "".join(f"{preset:>17}" for preset in PRESETS)]
    for name in names:
        cells = [_shown((vars(config) | vars(config.hyper))[name]) for config in configs]
        if len(set(cells)) > 1:
            lines.append(f"  --{name.replace('_', '-'):24}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _shown(value: object) -> str:
    """As it is typed behind its flag, but with separators."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:_}" if type(value) is int else str(value)
