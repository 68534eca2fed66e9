"""Test the claim: which metric of the behaviour measures a displacement better than its length does?

    python benchmarks/science.py                     # everything: an hour or more on two cores; a second call goes on
    python benchmarks/science.py --quick             # the same questions with fewer seeds: minutes
    python benchmarks/science.py gain kl --seeds 3   # some sections

    gain       Q gained per KL paid on known Gaussians and a mixture, against updates of the flow's training
    kl         the true KL divergence on curved and multi-modal densities, against the budget
    settings   t, K, damping and steps
    returns    the agent's returns in each metric, placed by what the behaviour's own log-density loses

Answers are kept in runs/science, one file each, and what is missing is computed. Tables and pictures are drawn from
them into docs/science, or with --quick into runs/science/quick/report.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from tqdm import tqdm

from benchmarks.evidence import gain, kl, report, returns, settings
from benchmarks.evidence.flows import UPDATES

Section = Literal["gain", "kl", "settings", "returns"]
SECTIONS = {"gain": gain.tasks, "kl": kl.tasks, "settings": settings.tasks, "returns": returns.tasks}


@dataclasses.dataclass(frozen=True)
class Config:
    """Test the claim. Sections: gain, kl, settings, returns; all of them unless some are named."""

    sections: tyro.conf.Positional[tuple[Section, ...]] = tuple(SECTIONS)
    quick: bool = False
    """One seed, and flows of at most 4,000 updates."""
    seeds: int = 3
    """Seeds 0, 1, ... of every flow and agent."""
    workers: int = 2
    """Processes, of one thread each."""
    data: Path = Path("runs/science")
    """Where answers and trained flows are kept."""
    out: Path | None = None
    """Where tables and pictures are drawn: docs/science by default, but DATA/quick/report after --quick."""


class Task(NamedTuple):
    path: Path
    """The file of its answer."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def tasks(config: Config, data: Path) -> Iterable[Task]:
    """Everything to be answered, in the order of seeds, so that there is soon something to see."""
    updates = UPDATES[:2] if config.quick else UPDATES
    for seed in range(1 if config.quick else config.seeds):
        for section in config.sections:
            yield from (Task(*task) for task in SECTIONS[section](data, seed, updates, config.quick))


def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(Config, args=argv)
    data = config.data / "quick" if config.quick else config.data
    missing = [task for task in tasks(config, data) if not task.path.exists()]
    with concurrent.futures.ProcessPoolExecutor(
        config.workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(task.function, *task.arguments): task for task in missing}
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="answer"):
            task, answer = futures[future], future.result()
            task.path.parent.mkdir(parents=True, exist_ok=True)
            partial = task.path.with_suffix(".partial")
            partial.write_text(json.dumps(answer))
            partial.rename(task.path)
    # a quick run must not replace what is documented
    out = config.out or (data / "report" if config.quick else Path("docs/science"))
    for path in report.draw(data, out, config.sections):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
