"""The scores of a sweep's trials: the latest evaluation of each, as a table of environments and agents and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from train.agents import AGENTS
from train.environments import resolve
from train.evaluate import ROLES
from train.outputs.folder import defaults
from train.outputs.record import EVALUATION_COLUMNS, read_table
from train.outputs.report import cloning_title, with_interval
from train.outputs.statistics import Middle, mean_of_tasks
from train.reading import read_json
from train.settings import RunConfig, RunError, role_names

NOT_OF_THE_RESULT = ("out", "resume", "overwrite", "preset", "device", "capture", "profile", "num_seeds")
"""Settings that a finished run may have otherwise and still be the run that is asked for."""


@dataclasses.dataclass
class Trial:
    """One run of a sweep."""

    config: RunConfig
    options: list[str]
    status: Literal["waiting", "running", "finished", "failed"] = "waiting"
    error: str = ""
    step: int = 0
    evaluations: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    """The latest row of evaluations.csv for each of the `ROLES`."""

    @property
    def name(self) -> str:
        return f"{self.config.env}/{self.config.agent}-seed{self.config.seed}"

    @property
    def last_step(self) -> int:
        return self.config.offline_steps + self.config.online_steps

    @property
    def latest(self) -> str:
        """The latest score, for display."""
        row = self.evaluations.get("policy")
        return f"{float(row['score_mean']):.1f} ± {float(row['score_sem']):.1f}" if row else ""

    def look(self) -> bool:
        """Read from its folder how far it is; returns whether there is another evaluation than before."""
        before = self.evaluations
        try:
            rows = read_table(self.config.folder / "evaluations.csv")
            self.evaluations = {row["role"]: row for row in rows}
            for row in rows:
                float(row["score_mean"]), float(row["score_sem"])
            rows = read_table(self.config.folder / "metrics.csv")
            self.step = int(rows[-1]["step"]) if rows else 0
        except FileNotFoundError:
            pass
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(f"the tables in {self.config.folder} are not those of a run ({error!r})") from error
        return self.evaluations != before

    def score(self, role: str) -> float | None:
        """The score that counts in the table. A failed trial has none, whatever it had reached."""
        if self.status == "failed" or role not in self.evaluations:
            return None
        return float(self.evaluations[role]["score_mean"])


def is_finished(config: RunConfig) -> bool:
    """Whether a run with these settings has finished in its folder."""
    try:
        before = read_json(config.folder / "result.json")["config"]
        before |= before.pop("hyper")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # none yet, or damaged: the run goes on from its last checkpoint and writes it again
    now = config.as_json()
    now |= now.pop("hyper")
    before = defaults(config) | before
    return all(before.get(name) == now[name] for name in now.keys() - set(NOT_OF_THE_RESULT))


class Column(NamedTuple):
    title: str
    agent: str
    role: str


class Cell(NamedTuple):
    """The trials behind one number of the table."""

    scores: list[list[float]]
    """Of each environment that has any, one for each seed."""
    finished: int
    trials: int

    @property
    def middle(self) -> Middle:
        return mean_of_tasks(self.scores)

    @property
    def is_final(self) -> bool:
        return self.finished == self.trials

    def __str__(self) -> str:
        if self.is_final:
            return with_interval(*self.middle)
        return f"{f'*{with_interval(*self.middle)}*' if self.scores else '–'}, {self.finished} of {self.trials}"


def columns_of(trials: Sequence[Trial]) -> list[Column]:
    """Each agent as it acts by its runs' rule and, where that is another, by one sample; then its flow alone."""
    columns, agents = [], list(dict.fromkeys(trial.config.agent for trial in trials))
    for agent in agents:
        names = [role_names(trial.config) for trial in trials if trial.config.agent == agent]
        title = AGENTS[agent].title
        rules = {of_run["policy"] for of_run in names}
        columns.append(Column(rules.pop().replace(agent, title, 1) if len(rules) == 1 else title, agent, "policy"))
        if any("sample" in of_run for of_run in names):
            columns.append(Column(f"{title}, one sample", agent, "sample"))
    return [*columns, Column(cloning_title(agents[0]), agents[0], "flow")]


class Scores:
    """The table of a sweep."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.columns = columns_of(trials)
        self.envs = list(dict.fromkeys(trial.config.env for trial in trials))
        self.seeds = list(dict.fromkeys(trial.config.seed for trial in trials))

    def cell(self, envs: Sequence[str], column: Column) -> Cell:
        of_envs: dict[str, list[Trial]] = {env: [] for env in envs}
        for trial in self.trials:
            if trial.config.agent == column.agent and trial.config.env in of_envs:
                of_envs[trial.config.env].append(trial)
        scores = [[s for trial in of_env if (s := trial.score(column.role)) is not None] for of_env in of_envs.values()]
        trials = [trial for of_env in of_envs.values() for trial in of_env]
        finished = sum(trial.status == "finished" for trial in trials)
        return Cell([of_env for of_env in scores if of_env], finished, len(trials))

    def rows(self) -> dict[str, list[Cell]]:
        """A row of cells for each environment, and at last one for their mean if there are several."""
        rows = {env: [self.cell([env], column) for column in self.columns] for env in self.envs}
        if len(self.envs) > 1:
            rows["mean"] = [self.cell(self.envs, column) for column in self.columns]
        return rows

    @property
    def label(self) -> str:
        """What is measured."""
        return " or ".join(dict.fromkeys(resolve(env).scoring.name for env in self.envs))

    def markdown(self) -> str:
        columns = [column.title for column in self.columns]
        lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in self.rows().items()]
        seeds = ", ".join(map(str, self.seeds))
        count = f"{sum(trial.status == 'finished' for trial in self.trials)} of {len(self.trials)}"
        lines += [
            "",
            f"{self.label[0].upper()}{self.label[1:]} after the last update: interquartile mean with its 95 %",
        ]
        lines[-1] += f" bootstrap interval over seeds ({seeds}). {count} trials have finished."
        if any(trial.status != "finished" for trial in self.trials):
            lines[-1] += (
                " In italics: not all of its trials have; the latest evaluations of those still to finish count as they"
                " are, and those that failed do not count."
            )
        if len(self.envs) > 1:
            lines[-1] += (
                " The mean is that of the environments' interquartile means; its interval comes from resampling the"
                " seeds of each environment."
            )
        going = [t for t in self.trials if t.status == "running" or (t.status == "waiting" and t.step)]
        if going:
            lines += ["", "| unfinished | step | score |", "|---|---|---|"]
            lines += [f"| {t.name} | {t.step:,} of {t.last_step:,} | {t.latest} |" for t in going]
        failed = [trial for trial in self.trials if trial.status == "failed"]
        if failed:
            lines += ["", "Failed (log.txt in the trial's folder has more; the same command tries again):", ""]
            lines += [f"- {trial.name}: {trial.error}" for trial in failed]
        return "\n".join(lines) + "\n"

    def document(self) -> dict[str, Any]:
        """The table for JSON, its cells in the order of the columns, and how each trial stands."""
        rows = {}
        for name, cells in self.rows().items():
            rows[name] = [dict(zip(("middle", "interval"), cell.middle)) if cell.scores else None for cell in cells]
        trials = [{"name": t.name, "status": t.status, "step": t.step, "error": t.error} for t in self.trials]
        return {"columns": [column.title for column in self.columns], "rows": rows, "trials": trials}

    def csv(self) -> str:
        """A row for each trial and role."""
        columns = ("env", "agent", "seed", *EVALUATION_COLUMNS, "status", "error")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        for trial in self.trials:
            of_trial = {"env": trial.config.env, "agent": trial.config.agent, "seed": trial.config.seed}
            for role in ROLES:
                row = trial.evaluations.get(role, {"role": role})
                writer.writerow({**of_trial, **row, "status": trial.status, "error": trial.error})
        return text.getvalue()
