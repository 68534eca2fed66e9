"""Test the claim: which metric of the behaviour measures a displacement better than its length does?

Answers are kept in runs/science, one file each, and what is missing is computed. Tables and pictures are drawn from
them into docs/science, or with --quick into runs/science/quick/report.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from benchmarks.evidence import gain, kl, report, returns, settings
from benchmarks.evidence.flows import UPDATES
from train import options, progress
from train.outputs import console
from train.outputs.console import Ending, Output

Section = Literal["gain", "kl", "settings", "returns"]
SECTIONS = {"gain": gain.tasks, "kl": kl.tasks, "settings": settings.tasks, "returns": returns.tasks}
PROGRAM = "python benchmarks/science.py"
EXAMPLES = (
    (PROGRAM, "everything: an hour or more on two cores; a second call goes on"),
    (f"{PROGRAM} --quick", "the same questions with fewer seeds: minutes"),
    (f"{PROGRAM} gain kl --seeds 3", "some sections"),
)


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Test the claim: which metric of the behaviour measures a displacement better than its length does?"""

    sections: tyro.conf.Positional[tuple[Section, ...]] = tuple(SECTIONS)
    """What to test.
    - gain: Q gained per KL paid on known Gaussians and a mixture, against updates of the flow's training.
    - kl: the true KL divergence on curved and multi-modal densities, against the budget.
    - settings: t, K, damping and steps.
    - returns: the agent's returns in each metric, placed by what the behaviour's own log-density loses."""
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


def parse(argv: Sequence[str] | None) -> Config:
    return options.parse(Config, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    return console.conclude(lambda: test(config), config, (OSError,), "the same command goes on")


def test(config: Config) -> Ending:
    data = config.data / "quick" if config.quick else config.data
    missing = [task for task in tasks(config, data) if not task.path.exists()]
    with concurrent.futures.ProcessPoolExecutor(config.workers, initializer=_begin) as pool:
        try:
            futures = {pool.submit(task.function, *task.arguments): task for task in missing}
            ended = concurrent.futures.as_completed(futures)
            for future in progress.bar(ended, desc="science", total=len(futures), unit="answer"):
                task, answer = futures[future], future.result()
                task.path.parent.mkdir(parents=True, exist_ok=True)
                partial = task.path.with_suffix(".partial")
                partial.write_text(json.dumps(answer))
                partial.rename(task.path)
        except BaseException:  # such as Ctrl-C: do not wait for answers that take minutes
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    # a quick run must not replace what is documented
    out = config.out or (data / "report" if config.quick else Path("docs/science"))
    paths = report.draw(data, out, config.sections)
    return Ending("\n".join(f"wrote {path}" for path in paths), {"wrote": paths})


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    torch.set_num_threads(1)


if __name__ == "__main__":
    console.start(main)
