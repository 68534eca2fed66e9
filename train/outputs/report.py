"""The scores that a run prints: a line for each evaluation, and tables at the end."""

from __future__ import annotations

from collections.abc import Sequence

from train.agents import AGENTS
from train.data.spec import EnvSpec
from train.evaluate import ROLES
from train.outputs.diverged import Diverged
from train.outputs.result import Result
from train.outputs.statistics import interquartile_mean
from train.settings import RunConfig, role_names


def title(config: RunConfig, spec: EnvSpec) -> str:
    return f"{spec.score_label}: {spec.scoring.legend}; {config.eval_episodes} episodes, ± standard error"


def with_interval(middle: float, interval: tuple[float, float]) -> str:
    return f"{middle:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"


def cloning_title(agent: str) -> str:
    """Name of the flow alone in comparisons; every run trains and evaluates one."""
    return f"behaviour cloning ({AGENTS[agent].title}'s flow alone)"


def final_table(result: Result, minutes: float) -> str:
    config, found = result.config, result.last_and_best
    lines = ["", title(config, result.spec), ""]
    header = f"{'':26}{'return, last':>18}{'score, last':>16}{'score, best':>16}{'at step':>12}{'of episodes':>13}"
    lines.append(header + (f"{'score, offline':>18}" if config.online_steps else ""))
    for role, name in role_names(config).items():
        last, best = found[role]["last"], found[role]["best"]
        lines.append(
            f"{name:26}{last['return_mean']:>10,.0f} ± {last['return_sem']:<5,.0f}"
            f"{last['score_mean']:>9.1f} ± {last['score_sem']:<4.1f}"
            f"{best['score_mean']:>9.1f} ± {best['score_sem']:<4.1f}{best['step']:>12,}{best['episodes']:>13}"
        )
        if config.online_steps:
            offline = found[role]["offline"]
            lines[-1] += f"{offline['score_mean']:>11.1f} ± {offline['score_sem']:.1f}"
    lines.append(f"{'dataset':26}{result.dataset_return:>10,.0f}{'':8}{result.dataset_score:>9.1f}")
    if three := result.last_three:
        lines += [
            "",
            f"Mean of the last three evaluations, from step {three['first_step']:,}: {three['score_mean']:.1f}",
        ]
    lines += ["", f"{minutes:.1f} minutes. In {config.folder}: curve.png, metrics.csv, evaluations.csv, "]
    lines[-1] += "tensorboard/, policy.safetensors, result.json"
    return "\n".join(lines)


def group_table(config: RunConfig, results: Sequence[Result], minutes: float, diverged: Sequence[Diverged] = ()) -> str:
    """A table with a line for each seed and the interquartile mean over those that did not diverge."""
    names = role_names(config)
    columns = "".join(f"{name:>28}" for name in names.values())
    lines = ["", title(config, results[0].spec), "", f"{'':20}{columns}"]
    last_rows = [{role: result.last_and_best[role]["last"] for role in names} for result in results]
    of_seed = {of_one.seed: f"{'':8}diverged at update {of_one.update:,}" for of_one in diverged}
    for result, last in zip(results, last_rows):
        scores = "".join(f"{row['score_mean']:>20.1f} ± {row['score_sem']:<5.1f}" for row in last.values())
        of_seed[result.config.seed] = scores
    lines += [f"{f'seed {seed}':20}{scores}" for seed, scores in sorted(of_seed.items())]
    cells = ""
    for role in names:
        middle, (low, high) = interquartile_mean([last[role]["score_mean"] for last in last_rows])
        cells += f"{f'{middle:.1f} [{low:.1f}, {high:.1f}]':>28}"
    lines.append(f"{'interquartile mean':20}{cells}   [95 % interval over seeds]")
    lines.append(f"{'dataset':20}{results[0].dataset_score:>20.1f}")
    folders = f"{config.agent}-seed{config.seed} ... {config.agent}-seed{config.seed + config.num_seeds - 1}"
    lines += ["", f"{minutes:.1f} minutes. {config.group_curve}; in {folders} the files of each seed"]
    return "\n".join(lines)


def evaluation_line(step: int, seed: str, rows: dict[str, dict[str, float]], config: RunConfig, minutes: float) -> str:
    """The line that is printed after each evaluation."""
    scores = {role: f"{rows[role]['score_mean']:5.1f} ± {rows[role]['score_sem']:.1f}" for role in ROLES}
    line = f"step {step:>9,}  {seed}score {scores['policy']}"
    if config.acting != "sample":
        line += f" ({config.acts})   one sample {scores['sample']}"
    return f"{line}   flow alone {scores['flow']}   {minutes:.1f} min"
