"""Generate data of an OGBench task on this machine, with the scripted controllers that come with the package.

    python train/collect.py --env cube-single-play --episodes 100 --workers 2
    python train/collect.py --env pointmaze-large-navigate --episodes 1000

It stands in for OGBench's data where they cannot be downloaded. Episodes are stored in parts of ten; a second call goes
on after an interrupted one, or adds episodes. They depend on their name and number alone, so that all machines with the
same versions of MuJoCo and OGBench make the same data.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from train.behaviour import scripted
from train.behaviour.scripted import CannotPlay
from train.data import collected
from train.outputs.disk import explain


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Generate data of an OGBench task with the scripted controllers that come with the package."""

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


def main(argv: Sequence[str] | None = None) -> int:
    config = tyro.cli(CollectConfig, args=sys.argv[1:] if argv is None else argv)
    try:
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
    except (CannotPlay, OSError) as error:
        print(f"error: {explain(error, 'then the same command goes on after the last whole part')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last whole part", file=sys.stderr)
        return 130
    size = sum(stat.st_size for stat in stats) / 1e6
    # not what was missing before: a damaged part is generated again
    new = sum(before.get(part) != stat.st_mtime_ns for part, stat in zip(parts, stats)) * collected.PART_EPISODES
    print(f"done       {episodes:,} episodes, {episodes * (recipe.rows - 1):,} transitions, {size:,.1f} MB")
    if new:
        print(f"speed      {new:,} episodes in {seconds:,.0f} s, {new / seconds:.2f} episodes per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
