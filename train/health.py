"""Whether the numbers of an update are sound, and which of them are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from train.agents.base import Agent, Draws, Parts
from train.data.transitions import Batch

MOMENTS = "Adam's moments"
Wrong = dict[str, list[str]]
"""For each kind of number, such as ``losses``, the names of those that went wrong; kinds without any are left out."""


def sound(losses: Tensor, norms: Tensor) -> Tensor:
    """Whether each agent's parameters may take the step that its gradients ask for.

    The loss must be finite, and so must the square of the gradients' norm. Adam keeps squares of gradients. Where they
    overflow (in float32 beyond 1.8e19) all gradients may still be finite; `inspect` tells the two apart. An infinite
    square would stay in Adam's state for ever, and clipping by an infinite norm would make the step zero.
    """
    return losses.isfinite() & norms.square().isfinite()


def unsound(healthy: Tensor) -> list[int]:
    """Where ``healthy``, what `sound` returned, is False. This waits for the device."""
    return [i for i, is_healthy in enumerate(healthy.view(-1).tolist()) if not is_healthy]


class FirstUnsound:
    """The first unsound update of each agent, noted on the device: a CUDA graph can neither wait for it nor stop.

    Args:
        agents: number of agents.
        device: where their updates run.
    """

    def __init__(self, agents: int, device: torch.device) -> None:
        self._update = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.zeros(agents, dtype=torch.int64, device=device)

    def begin(self, updates: int) -> None:
        """Count on from this number of updates."""
        self._update.fill_(updates)

    def note(self, healthy: Tensor) -> None:
        """One update was made; ``healthy`` is what `sound` returned. Nothing waits for the device."""
        self._update += 1
        first = ~healthy.view(-1) & (self._first == 0)
        self._first.copy_(torch.where(first, self._update, self._first))

    def read(self) -> list[int]:
        """The number of each agent's first unsound update, counted from 1; 0 if all were sound."""
        return self._first.tolist()


# -- which numbers -------------------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What a tensor holds."""

    kind: str
    name: str
    size: int
    wrong: int
    """How many of them are NaN or infinite."""
    largest: float
    """The largest absolute value of the others; 0 if there are none."""


def numbers(kind: str, tensors: Mapping[str, Tensor]) -> list[Numbers]:
    rows = []
    for name, tensor in tensors.items():
        finite = tensor.isfinite()
        absolute = torch.where(finite, tensor, torch.zeros_like(tensor)).abs()
        largest = float(absolute.max()) if tensor.numel() else 0.0
        rows.append(Numbers(kind, name, tensor.numel(), int((~finite).sum()), largest))
    return rows


def inspect(agent: Agent, moments: Mapping[str, Tensor], batch: Batch, draws: Draws, parts: Parts) -> list[Numbers]:
    """Make the update's losses and gradients once more, and look at all its numbers, causes before consequences.

    ``.grad`` holds the gradients afterwards; nothing else of the agent changes.
    """
    columns, noise = given(batch), given(draws)
    rows = [*state_numbers(agent, moments), *numbers("batch", columns), *numbers("noise", noise)]
    seen = agent.backward(batch, draws, parts, log=True)
    return [
        *rows,
        *numbers("losses", {name: value for name, value in seen.items() if name.endswith("_loss")}),
        *gradient_numbers(agent.gradients_of(0)),
    ]


def given(columns: Batch | Draws) -> dict[str, Tensor]:
    """The columns that there are, by name."""
    return {name: column for name, column in columns._asdict().items() if column is not None}


def state_numbers(agent: Agent, moments: Mapping[str, Tensor]) -> list[Numbers]:
    """The numbers of agent and optimiser; ``moments`` are named as in a checkpoint."""
    return [
        *numbers("parameters", agent.state_dict()),
        *numbers(MOMENTS, moments_by_parameter(agent, moments)),
    ]


def moments_by_parameter(agent: Agent, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adam's state under the names of the parameters. In a checkpoint they are numbered: ``3/exp_avg``."""
    learning = [name for name, p in agent.named_parameters() if p.requires_grad]
    numbered = ((int(key.partition("/")[0]), key.partition("/")[2], tensor) for key, tensor in moments.items())
    return {f"{learning[i]} {field}": tensor for i, field, tensor in sorted(numbered, key=lambda row: row[:2])}


def gradient_numbers(gradients: Mapping[str, Tensor]) -> list[Numbers]:
    """The gradients; and the sum of their squares, with the largest gradient, if that alone is not finite."""
    rows = numbers("gradients", gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm() if gradients else torch.zeros(())
    if any(row.wrong for row in rows) or norm.square().isfinite():
        return rows
    largest = max(rows, key=lambda row: row.largest)
    name = f"their sum, the largest in {largest.name}"
    return [*rows, Numbers("squares of gradients", name, 1, 1, largest.largest)]


def wrong(rows: Iterable[Numbers]) -> Wrong:
    found: Wrong = {}
    for row in rows:
        if row.wrong:
            found.setdefault(row.kind, []).append(row.name)
    return found


def describe(found: Wrong, most: int = 4) -> str:
    """Such as ``batch: rewards; losses: critic_loss; gradients: critic.weights.0, critic.biases.0 and 9 more``."""
    return "; ".join(
        f"{kind}: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")
        for kind, names in found.items()
    )
