"""Generate data of an OGBench task on this machine, with the scripted controllers that come with the package.

It stands in for OGBench's data where they cannot be downloaded. Episodes are stored in parts of ten; a second call goes
on after an interrupted one, or adds episodes. They depend on their name and number alone, so that all machines with the
same versions of MuJoCo and OGBench make the same data.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from train import options
from train.behaviour import scripted
from train.behaviour.scripted import CannotPlay
from train.data import collected
from train.outputs import console
from train.outputs.console import Ending, Output

PROGRAM = "python train/collect.py"
EXAMPLES = (
    (f"{PROGRAM} --env cube-single-play --workers 2", "100 episodes, in two processes"),
    (f"{PROGRAM} --env pointmaze-large-navigate --episodes 1000", "more; what is there already is kept"),
)


@dataclasses.dataclass(frozen=True)
class CollectConfig(Output):
    """Generate data of an OGBench task with the scripted controllers that come with the package. A second call goes on
    after an interrupted one, or adds episodes."""

    env: str
    """OGBench's name of the data without its version, such as cube-single-play; a wrong name lists all."""
    episodes: int = 100
    """Episodes to have in the end, rounded up to whole parts of ten. OGBench's own data have 500 to 5000."""
    workers: int | None = None
    """Processes to play in; one per core by default."""
    folder: Path | None = None
    """Folder of all collected data; $FDKERNELS_DATA or ~/.ogbench/fdkernels by default."""

    def __post_init__(self) -> None:
        for name in ("episodes", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def parse(argv: Sequence[str] | None) -> CollectConfig:
    return options.parse(CollectConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    again = "the same command goes on after the last whole part"
    return console.conclude(lambda: collect(config), config, (CannotPlay, OSError), again)


def collect(config: CollectConfig) -> Ending:
    recipe = scripted.recipe_of(config.env)
    scripted.check_installed()
    parts = collected.parts(config.env, config.episodes, config.folder)
    episodes = len(parts) * collected.PART_EPISODES
    before = {part: part.stat().st_mtime_ns for part in parts if part.exists()}
    here = len(before) * collected.PART_EPISODES
    print(f"data       {config.env}, {episodes:,} episodes of {recipe.rows - 1:,} transitions ({recipe.env_id})")
    print(f"folder     {parts[0].parent}")
    print(f"here       {here:,} episodes, {episodes - here:,} to generate", flush=True)
    started = time.perf_counter()
    collected.collect(config.env, config.episodes, workers=config.workers, folder=config.folder)
    seconds = time.perf_counter() - started
    stats = [part.stat() for part in parts]
    size = sum(stat.st_size for stat in stats)
    # not what was missing before: a damaged part is generated again
    new = sum(before.get(part) != stat.st_mtime_ns for part, stat in zip(parts, stats)) * collected.PART_EPISODES
    transitions = episodes * (recipe.rows - 1)
    text = f"done       {episodes:,} episodes, {transitions:,} transitions, {size / 1e6:,.1f} MB"
    if new:
        text += f"\nspeed      {new:,} episodes in {seconds:,.0f} s, {new / seconds:.2f} episodes per second"
    found = {"episodes": episodes, "transitions": transitions, "bytes": size, "generated": new, "seconds": seconds}
    return Ending(text, {"env": config.env, "folder": parts[0].parent} | found)


if __name__ == "__main__":
    console.start(main)
