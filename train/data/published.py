"""The published settings of tasks: what ``--preset full`` picks, each with its source.

A row holds for the tasks that its pattern matches from the start of their names, and for one agent. Runs that go online
have rows of their own where other settings are published for them, and otherwise the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    agent: str
    tasks: str
    """Regular expression."""
    settings: Mapping[str, Any]
    """Settings and hyper-parameters; all others have the agent's published values."""
    source: str
    online: bool = False
    """For runs that go online."""


FIDEC = "the authors' scripts for arXiv 2604.17919"
FQL = "the authors' commands for arXiv 2502.02538"
DEFLOW = "the authors' scripts for DeFlow"

NORMALIZED = {"normalize_q": True}
MINIMUM = {"q_aggregation": "min"}
LONG = {"discount": 0.995}
HALF = {"steps": 500_000}
PIXELS = {"encoder": "impala-small", "augment": 0.5, "frame_stack": 3}

# A million updates, evaluated every 100,000 of them with 50 episodes, are the defaults of a run.
TABLE = (
    # offline to online; a million updates first, on D4RL too
    Row("fql", "humanoidmaze-medium-navigate-", {**LONG, "alpha": 100.0}, FQL, online=True),
    Row("fql", "antsoccer-arena-navigate-", {**LONG, "alpha": 30.0}, FQL, online=True),
    Row("fql", "(cube-double|scene)-play-", {"alpha": 300.0}, FQL, online=True),
    Row("fql", "puzzle-4x4-play-", {"alpha": 1_000.0}, FQL, online=True),
    Row("fql", "antmaze-(umaze|umaze-diverse|medium-play|medium-diverse)$", {"alpha": 10.0}, FQL, online=True),
    Row("fql", "antmaze-large-(play|diverse)$", {"alpha": 3.0}, FQL, online=True),
    Row("fql", "(pen|door|hammer)-cloned", {**MINIMUM, "alpha": 1_000.0}, FQL, online=True),
    Row("fql", "relocate-cloned", {**MINIMUM, "alpha": 10_000.0}, FQL, online=True),
    # OGBench
    Row("fidec", "antmaze-large-.*-singletask", {**NORMALIZED, **MINIMUM, "target_divergence": 0.01}, FIDEC),
    Row("fidec", "antmaze-giant-.*-singletask", {**NORMALIZED, **MINIMUM, **LONG, "target_divergence": 0.01}, FIDEC),
    Row("fidec", "humanoidmaze-(medium|large)-", {**NORMALIZED, **LONG, "target_divergence": 0.001}, FIDEC),
    Row("fidec", "antsoccer-", {**NORMALIZED, **LONG, "target_divergence": 0.01}, FIDEC),
    Row("fidec", "(cube-(single|double)|scene)-", {**NORMALIZED, "target_divergence": 0.001}, FIDEC),
    Row("fidec", "puzzle-(3x3|4x4)-", {**NORMALIZED, "target_divergence": 0.005}, FIDEC),
    Row("fql", "antmaze-large-.*-singletask", {**MINIMUM, "alpha": 10.0}, FQL),
    Row("fql", "antmaze-giant-.*-singletask", {**MINIMUM, **LONG, "alpha": 10.0}, FQL),
    Row("fql", "humanoidmaze-(medium|large)-", {**LONG, "alpha": 30.0}, FQL),
    Row("fql", "antsoccer-arena-", {**LONG, "alpha": 10.0}, FQL),
    Row("fql", "(cube-(single|double)|scene)-", {"alpha": 300.0}, FQL),
    Row("fql", "puzzle-(3x3|4x4)-", {"alpha": 1000.0}, FQL),
    Row("fql", "visual-(cube-single|puzzle-(3x3|4x4))-", {**HALF, **PIXELS, "alpha": 300.0}, FQL),
    Row("fql", "visual-(cube-double|scene)-", {**HALF, **PIXELS, "alpha": 100.0}, FQL),
    # D4RL
    Row("fql", "antmaze-(umaze|umaze-diverse|medium-play|medium-diverse)$", {**HALF, "alpha": 10.0}, FQL),
    Row("fql", "antmaze-large-(play|diverse)$", {**HALF, "alpha": 3.0}, FQL),
    Row("fql", "pen-expert", {**HALF, **MINIMUM, "alpha": 3_000.0}, FQL),
    Row("fql", "pen-|hammer-cloned|relocate-human", {**HALF, **MINIMUM, "alpha": 10_000.0}, FQL),
    Row("fql", "door-|hammer-|relocate-", {**HALF, **MINIMUM, "alpha": 30_000.0}, FQL),
    Row("deflow", "antmaze-[a-z-]+$", {**HALF, **NORMALIZED, "target_divergence": 0.015}, DEFLOW),
    Row("deflow", "pen-", {**HALF, **NORMALIZED, **MINIMUM, "target_divergence": 0.01}, DEFLOW),
    Row("deflow", "door-|hammer-|relocate-", {**HALF, **NORMALIZED, **MINIMUM, "target_divergence": 0.001}, DEFLOW),
)


def row_of(task: str, agent: str, online: bool = False) -> Row | None:
    """The first row that holds for the task."""
    rows = (row for row in TABLE if row.agent == agent and row.online <= online and re.match(row.tasks, task))
    return next(rows, None)


def changes(task: str, preset: str, agent: str, online: bool = False) -> Mapping[str, Any]:
    """What the preset changes for the task: the published row if it is ``full``."""
    row = row_of(task, agent, online)
    return row.settings if preset == "full" and row is not None else {}


def describe(task: str, agent: str, online: bool = False) -> str:
    """The row and its source, or that there is none."""
    row = row_of(task, agent, online)
    if row is None:
        return f"no published settings of {agent} for {task}: its defaults"
    source = f"{row.source}, {'offline to online' if row.online else 'offline'}" if online else row.source
    return f"{', '.join(f'{name} {value}' for name, value in row.settings.items())} (from {source})"
