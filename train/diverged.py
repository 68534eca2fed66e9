"""Make the update at which a run's numbers went wrong again, and print which numbers are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from train import options
from train.agents.base import Draws
from train.data.transitions import Batch
from train.exits import Exit
from train.health import MOMENTS, Numbers, describe, given, inspect, state_numbers, wrong
from train.outputs import console
from train.outputs.console import Ending, Output
from train.outputs.diverged import DivergedError, Saved, read_diverged
from train.processes import Place
from train.run import choose_device
from train.settings import RunError

PROGRAM = "python train/diverged.py"
EXAMPLES = ((f"{PROGRAM} runs/halfcheetah-medium-expert/fidec-seed0", "which loss, gradient or parameter was it?"),)


@dataclasses.dataclass(frozen=True)
class DivergedConfig(Output):
    """Make the update at which a run's numbers went wrong again, and print which numbers are not finite."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, with diverged.safetensors."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""


def table(rows: Iterable[Numbers]) -> str:
    """Everything, but of Adam's moments, which are twice as many as the parameters, only what is not finite."""
    rows = [row for row in rows if row.kind != MOMENTS or row.wrong]
    width = max(len(row.name) for row in rows)
    lines, kind = [], ""
    for row in rows:
        if row.kind != kind:
            lines += ["", f"{row.kind:{width + 2}}{'numbers':>12}{'not finite':>12}{'largest other':>15}"]
            kind = row.kind
        bad = f"{row.wrong:,}" if row.wrong else "-"
        lines.append(f"  {row.name:{width}}{row.size:>12,}{bad:>12}{row.largest:>15.4g}")
    return "\n".join(lines)


def numbers_of(saved: Saved, device: torch.device) -> list[Numbers]:
    agent = saved.agent.to(device)
    if saved.update is None:
        return state_numbers(agent, saved.moments)
    batch, draws = (
        {name: column.to(device) for name, column in given(columns).items()}
        for columns in (saved.update.batch, saved.update.draws)
    )
    return inspect(agent, saved.moments, Batch(**batch), Draws(**draws), saved.update.parts)


def parse(argv: Sequence[str] | None) -> DivergedConfig:
    return options.parse(DivergedConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    return console.conclude(lambda: explain(config), config, (DivergedError, RunError, OSError))


def explain(config: DivergedConfig) -> Ending:
    saved = read_diverged(config.run)
    rows = numbers_of(saved, choose_device(config.device, Place()))
    print(saved.diverged)
    print(table(rows))
    found = wrong(rows)
    text, code = f"\nnot finite now: {describe(found) or 'nothing'}", Exit.DONE
    if saved.update is None:
        text += "\nThe file holds no update: these are the numbers when the fault was noticed."
    elif found != saved.diverged.found:
        text += "\nThen it was otherwise, see the first line: the update was made on another device or by other code."
        code = Exit.FAILED
    then = {"seed": saved.diverged.seed, "update": saved.diverged.update, "stage": saved.diverged.stage}
    now = {"now": found, "numbers": [row._asdict() for row in rows]}
    return Ending(text, {"run": config.run, **then, "found": saved.diverged.found, **now}, code)


if __name__ == "__main__":
    console.start(main)
