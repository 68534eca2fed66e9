"""The runs that ``compare.py`` and ``sweep.py`` make: their options, checked before any of them begins."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train import run
from train.settings import RunConfig, RunError, require_seed


class Planned(NamedTuple):
    options: list[str]
    config: RunConfig
    """The settings that the options mean."""


def check_choices(of: object, *names: str) -> None:
    """Raise ValueError if one of these options is empty or names something twice, or a seed is out of its range."""
    for name in names:
        values = getattr(of, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} must be one or more, each once, got {' '.join(map(str, values)) or 'none'}")
        for seed in values if name == "seeds" else ():
            require_seed(name, seed)


def options_behind(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options, and those behind ``--``, which go to every run."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:split]), list(arguments[split + 1 :])


def plan(fixed: Mapping[str, Any], folders: Mapping[int, Path], preset: str, extra: Sequence[str]) -> list[Planned]:
    """A run for each seed. It continues what its folder holds.

    Args:
        fixed: settings that the user cannot change behind ``--``, the environment and the agent among them.
        folders: each seed's folder.
        preset: the preset.
        extra: options that the user gave for every run; they win over the preset.

    Raises:
        RunError: ``extra`` changes one of ``fixed``, the seeds or the folders.
        SystemExit: an option is unknown or has a bad value; a message about it has been printed.
    """

    def options(seed: int, folder: Path) -> list[str]:
        given = {"preset": preset, **fixed, "seed": seed, "out": folder}
        return [*(f"--{name}={value}" for name, value in given.items()), "--resume", *extra]

    # Parsing is slow and seeds differ in nothing else, so it is done once, for a seed and a folder that no run has: an
    # option of the user's that sets them for all runs is then seen, whatever it sets.
    other, nowhere = next(seed for seed in itertools.count() if seed not in folders), Path("nowhere")
    config = run.parse(options(other, nowhere))
    settled = {**fixed, "seed": other, "num_seeds": 1, "out": nowhere, "resume": True, "overwrite": False}
    if any(getattr(config, name) != value for name, value in settled.items()):
        *names, last = (f"--{name.replace('_', '-')}" for name in settled)
        raise RunError(f"behind -- there can be no {', '.join(names)} or {last}")
    return [
        Planned(options(seed, folder), dataclasses.replace(config, seed=seed, out=folder))
        for seed, folder in folders.items()
    ]
