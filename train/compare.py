"""Train several agents on several seeds, one run after the other, and put their scores side by side.

    python train/compare.py --env halfcheetah-medium-expert --preset standard
    python train/compare.py --env hopper-medium-expert --preset quick --agents fidec fql --seeds 0 1 -- --lr 3e-4

Options after ``--`` go to every run (``python train/run.py --help``). Each run has its own folder; a second call reads
the finished runs and continues the interrupted one. Behaviour cloning is the flow alone (δ = 0), which every run trains
and evaluates. The table and the picture (compare.md, compare.png) are redrawn after every run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from train import run
from train.agents import AGENTS, AgentName
from train.environments import resolve
from train.outputs.curve import draw_comparison, interquartile_mean
from train.outputs.files import write_whole
from train.reading import read_json
from train.settings import PresetName


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Train several agents on several seeds and put their scores side by side. Options after -- go to every run."""

    env: str
    """The environment; `python train/environments.py` lists the names."""
    preset: PresetName = "auto"
    """Preset of every run."""
    agents: tuple[AgentName, ...] = tuple(AGENTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path | None = None
    """Folder of the comparison; runs/compare-ENV by default."""

    def __post_init__(self) -> None:
        for name in ("agents", "seeds"):
            value = getattr(self, name)
            if not value or len(set(value)) < len(value):
                raise ValueError(f"--{name} must be one or more, each once, got {' '.join(map(str, value)) or 'none'}")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"compare-{self.env}"


class Line(NamedTuple):
    """The last scores of one way to act, one per seed."""

    name: str
    scores: list[float]

    @property
    def middle(self) -> tuple[float, tuple[float, float]]:
        """The interquartile mean over seeds and its interval, which has no width for a single seed."""
        if len(self.scores) == 1:
            return self.scores[0], (self.scores[0], self.scores[0])
        return interquartile_mean(self.scores)


def lines_of(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Line]:
    """One `Line` per way to act, from each agent's summaries of finished runs (result.json)."""

    def scores(summaries: Sequence[Mapping[str, Any]], role: str) -> list[float]:
        return [summary["results"][role]["last"]["score_mean"] for summary in summaries]

    lines = []
    for agent, summaries in results.items():
        for role, name in summaries[0]["role_names"].items():
            if role != "flow":
                lines.append(Line(name.replace(agent, AGENTS[agent].title, 1), scores(summaries, role)))
    agent = max(results, key=lambda agent: len(results[agent]))
    return [*lines, Line(f"behaviour cloning ({AGENTS[agent].title}'s flow alone)", scores(results[agent], "flow"))]


def table(lines: Sequence[Line], results: Mapping[str, Sequence[Mapping[str, Any]]], env: str) -> str:
    (first, *_), *_ = results.values()
    episodes = first["config"]["eval_episodes"]
    seeds = [str(summary["config"]["seed"]) for summary in max(results.values(), key=len)]
    rows = [f"| {env} | {' | '.join(f'seed {seed}' for seed in seeds)} | all |", "|---" * (len(seeds) + 2) + "|"]
    for line in lines:
        middle, (low, high) = line.middle
        cells = [f"{score:.1f}" for score in line.scores] + [""] * (len(seeds) - len(line.scores))
        rows.append(f"| {line.name} | {' | '.join(cells)} | {middle:.1f} ({low:.1f} to {high:.1f}) |")
    minutes = ", ".join(
        f"{AGENTS[agent].title} {max(summary['seconds'] for summary in summaries) / 60:.0f}"
        for agent, summaries in results.items()
    )
    return "\n".join(
        [
            *rows,
            "",
            f"{resolve(env).scoring.name} in {first['env_id']} after the last update, {episodes} episodes a seed; all: "
            f"interquartile mean with its 95 % bootstrap interval over seeds. The dataset's episodes score "
            f"{first['dataset_score']:.1f}. Minutes of the longest run: {minutes}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config, extra = tyro.cli(CompareConfig, args=arguments[:split]), arguments[split + 1 :]
    plan = {
        (agent, seed): [
            *("--env", config.env, "--agent", agent, "--preset", config.preset, "--seed", str(seed)),
            *("--out", str(config.folder / f"{agent}-seed{seed}"), "--resume", *extra),
        ]
        for seed in config.seeds
        for agent in config.agents
    }
    for (agent, seed), options in plan.items():  # check all of them before any runs
        parsed = run.parse(options)
        asked = parsed.env, parsed.agent, parsed.seed, parsed.num_seeds, parsed.out
        if asked != (config.env, agent, seed, 1, config.folder / f"{agent}-seed{seed}"):
            print("error: behind -- there can be no --env, --agent, --seed, --num-seeds or --out", file=sys.stderr)
            return 2
    results: dict[str, list[dict[str, Any]]] = {}
    # seed by seed, so that there is soon something to compare
    for (agent, seed), options in plan.items():
        print(f"\n== {agent}, seed {seed}", flush=True)
        if code := run.main(options):
            return code
        summary = read_json(config.folder / f"{agent}-seed{seed}" / "result.json")
        results.setdefault(agent, []).append(summary)
        lines = lines_of(results)
        write_whole(config.folder / "compare.md", table(lines, results, config.env) + "\n")
        bars = {line.name: (*line.middle, line.scores) for line in lines}
        draw_comparison(config.folder / "compare.png", config.env, bars, summary["dataset_score"], summary["label"])
    print(f"\n{(config.folder / 'compare.md').read_text()}\nin {config.folder}: compare.md, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
