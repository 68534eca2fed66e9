"""Train several agents on several seeds, one run after the other, and put their scores side by side.

Options after ``--`` go to every run (``python train/run.py --help``). Each run has its own folder; a second call reads
the finished runs and continues the interrupted one. Behaviour cloning is the flow alone (δ = 0), which every run trains
and evaluates. The table and the picture (compare.md, compare.png) are redrawn after every run.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train import options, run
from train.agents import AGENTS, AgentName
from train.environments import resolve
from train.exits import Exit
from train.outputs import console
from train.outputs.console import Ending, Output
from train.outputs.files import write_whole
from train.outputs.report import cloning_title, with_interval
from train.outputs.statistics import Middle, interquartile_mean
from train.plan import check_choices, options_behind, plan
from train.reading import read_json
from train.settings import PresetName

PROGRAM = "python train/compare.py"
EXAMPLES = (
    (
        f"{PROGRAM} --env halfcheetah-medium-expert --preset standard",
        "every agent on three seeds",
    ),
    (f"{PROGRAM} --env hopper-medium --agents fidec fql --seeds 0 1 -- --lr 3e-4", "two agents with another setting"),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig(Output):
    """Train several agents on several seeds, one run after the other, and put their scores side by side. Options after
    -- go to every run. A second call reads the finished runs and continues the interrupted one."""

    env: str
    """The environment; `python train/environments.py` lists the names."""
    preset: PresetName = "auto"
    """Preset of every run, see `python train/run.py --help`."""
    agents: tuple[AgentName, ...] = tuple(AGENTS)
    """Agents to train, each once."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every agent, each once."""
    out: Path | None = None
    """Folder of the comparison; runs/compare-ENV by default."""

    def __post_init__(self) -> None:
        check_choices(self, "agents", "seeds")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"compare-{self.env}"


class Line(NamedTuple):
    """The last scores of one way to act, one per seed."""

    name: str
    scores: list[float]

    @property
    def middle(self) -> Middle:
        """The interquartile mean over seeds and its interval."""
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
    return [*lines, Line(cloning_title(agent), scores(results[agent], "flow"))]


def table(lines: Sequence[Line], results: Mapping[str, Sequence[Mapping[str, Any]]], env: str) -> str:
    (first, *_), *_ = results.values()
    episodes = first["config"]["eval_episodes"]
    seeds = [str(summary["config"]["seed"]) for summary in max(results.values(), key=len)]
    rows = [f"| {env} | {' | '.join(f'seed {seed}' for seed in seeds)} | all |", "|---" * (len(seeds) + 2) + "|"]
    for line in lines:
        cells = [f"{score:.1f}" for score in line.scores] + [""] * (len(seeds) - len(line.scores))
        rows.append(f"| {line.name} | {' | '.join(cells)} | {with_interval(*line.middle)} |")
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


def parse(argv: Sequence[str]) -> CompareConfig:
    return options.parse(CompareConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    arguments, extra = options_behind(sys.argv[1:] if argv is None else argv)
    config = parse(arguments)
    return console.conclude(lambda: compare(config, extra), config, run.REFUSALS, "the same command goes on")


def compare(config: CompareConfig, extra: Sequence[str]) -> Ending:
    from train.outputs.curve import draw_comparison  # takes a second to import

    # check all of them before any runs
    plans = {
        agent: plan(
            {"env": config.env, "agent": agent},
            {seed: config.folder / f"{agent}-seed{seed}" for seed in config.seeds},
            config.preset,
            extra,
        )
        for agent in config.agents
    }
    results: dict[str, list[dict[str, Any]]] = {}
    lines: list[Line] = []
    # seed by seed, so that there is soon something to compare
    for planned in itertools.chain.from_iterable(zip(*plans.values())):
        agent, folder = planned.config.agent, planned.config.folder
        print(f"\n== {agent}, seed {planned.config.seed}", flush=True)
        ending = run.train(planned.config)
        if ending.code == Exit.STOPPED:
            error = f"stopped at step {ending.document['step']:,} of {folder}; the same command goes on"
            return Ending("", {"error": error}, Exit.STOPPED)
        print(ending.text, flush=True)
        summary = read_json(folder / "result.json")
        results.setdefault(agent, []).append(summary)
        lines = lines_of(results)
        write_whole(config.folder / "compare.md", table(lines, results, config.env) + "\n")
        bars = {line.name: (*line.middle, line.scores) for line in lines}
        draw_comparison(config.folder / "compare.png", config.env, bars, summary["dataset_score"], summary["label"])
    text = f"\n{(config.folder / 'compare.md').read_text()}\nin {config.folder}: compare.md, compare.png"
    rows = [line._asdict() | dict(zip(("middle", "interval"), line.middle)) for line in lines]
    return Ending(text, {"env": config.env, "folder": config.folder, "seeds": config.seeds, "rows": rows})


if __name__ == "__main__":
    console.start(main)
