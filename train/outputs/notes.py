"""The notes of a checkpoint: what must be in them before a run goes on from there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from train.evaluate import ROLES
from train.reading import require_type


class Evaluation(TypedDict):
    """A row of evaluations.csv."""

    step: int
    role: str
    return_mean: float
    return_sem: float
    score_mean: float
    score_sem: float
    episodes: int


class Online(TypedDict):
    """`Explorer.notes`."""

    episodes: int
    steps: int
    ended: list[list[float]]


class Notes(TypedDict):
    """What every checkpoint has; those of a run that is online also have `Online`, as ``online``."""

    data: dict[str, Any]
    evaluations: list[Evaluation]
    seconds: float


def check_notes(notes: Mapping[str, Any], step: int) -> None:
    """Refuse notes that no run has written at that step.

    Raises:
        TypeError, ValueError: something is missing, or is not what it should be.
    """
    require_type("notes", {name: notes[name] for name in Notes.__annotations__ if name in notes}, Notes)
    if not (math.isfinite(notes["seconds"]) and notes["seconds"] >= 0):
        raise ValueError(f"it took {notes['seconds']} seconds")
    evaluations = notes["evaluations"]
    for i, row in enumerate(evaluations):
        if not 0 <= row["step"] <= step or row["role"] != ROLES[i % len(ROLES)] or row["episodes"] < 1:
            raise ValueError(
                f"its evaluation {i} is of {row['role'][:20]!r}, step {row['step']}, {row['episodes']} episodes"
            )
    if len(evaluations) % len(ROLES):
        raise ValueError(f"it has {len(evaluations)} evaluations, not one for each of {', '.join(ROLES)}")
    if "online" in notes:
        require_type("online", notes["online"], Online)
        online = notes["online"]
        if online["episodes"] < 0 or online["steps"] < 0 or any(len(pair) != 2 for pair in online["ended"]):
            raise ValueError(f"it has {online['episodes']} online episodes, {online['steps']} steps of the last")
