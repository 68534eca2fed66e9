"""Train several agents on several environments and seeds, on this machine or a Ray cluster, and put their scores into
one table.

Options after ``--`` go to every run (``python train/run.py --help``). Each run has its own folder; a second call reads
the finished runs and continues the others. The table, its numbers and a picture (sweep.md, sweep.csv, sweep.png) are
rewritten whenever a run evaluates or ends.

A trial is a task of Ray's core that trains in its own process: our runs resume exactly from their folders, so all that
is needed of Ray is to run a task again elsewhere when its process or node dies. Ray Tune would add checkpoints, result
files and a folder layout of its own beside ours, for a search over settings that a table does not need.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# with the usual 20, Ray looks for a dead cluster for a quarter of an hour
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
try:
    import ray
except ModuleNotFoundError as error:
    problem = "train/sweep.py needs Ray: pip install -e '.[sweep]'"
    if __name__ == "__main__":
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(problem, name="ray") from error

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train import options, progress
from train.agents import AGENTS, AgentName
from train.agents.hyperparameters import require
from train.data.spec import NotInstalled
from train.environments import UnknownEnvironment, resolve
from train.exits import Exit
from train.outputs import console
from train.outputs.console import Ending, Output
from train.outputs.files import write_whole
from train.outputs.folder import check_folder, lock_folders
from train.outputs.scores import Scores, Trial, is_finished
from train.plan import check_choices, options_behind, plan
from train.settings import PresetName, RunError
from train.signals import handle_stops
from train.worker import UNFIT, Board, Outcome, Site, Start, problem_of_node, train_trial, version

LOOK_EVERY = 1.0
"""Seconds between looks at what the trials have written."""
GRACE = 120.0
"""Seconds that trials have to stop with a checkpoint; an update or an evaluation must end first."""
ANSWER_WITHIN = 120.0
"""Seconds that a node has to say whether it can take part."""
MOST_IN_VAIN = 10
"""How often in a row the process or the node of a trial may die at the same step before the trial has failed."""
MARK = ".nodes-"
"""Beginning of the name of the file by which nodes recognise the sweep's folder."""


PROGRAM = "python train/sweep.py"
EXAMPLES = (
    (f"{PROGRAM} --envs halfcheetah-medium-expert hopper-medium-expert --preset quick", "on this machine's cores"),
    (
        f"{PROGRAM} --envs hopper-medium --agents fidec fql --address auto --out /shared/sweep -- --lr 3e-4",
        "two agents with another setting, on the cluster that this machine belongs to",
    ),
)


@dataclasses.dataclass(frozen=True)
class SweepConfig(Output):
    """Train several agents on several environments and seeds with Ray, and put their scores into one table. Options
    after -- go to every run. A second call reads the finished runs and continues the others."""

    envs: tuple[str, ...]
    """The environments; `python train/environments.py` lists the names."""
    agents: tuple[AgentName, ...] = tuple(AGENTS)
    """Agents to train on each, each once."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every agent, each once."""
    preset: PresetName = "auto"
    """Preset of every run, see `python train/run.py --help`. auto: full with --gpus-per-trial, else quick."""
    address: str | None = None
    """Address of a Ray cluster, or auto for the one that this machine belongs to. None: this machine alone, all of its
    cores."""
    cpus_per_trial: int = 1
    """Cores that a trial has for itself; it computes with as many threads, whatever OMP_NUM_THREADS says."""
    gpus_per_trial: float = 0.0
    """GPUs that a trial has for itself: 1, or the part of one that it shares. 0: it trains on the CPU."""
    out: Path = Path("runs/sweep")
    """Folder of the sweep. All nodes of a cluster must see it under this name."""

    def __post_init__(self) -> None:
        check_choices(self, "envs", "agents", "seeds")
        require("cpus_per_trial", self.cpus_per_trial, self.cpus_per_trial > 0, "positive")
        require("gpus_per_trial", self.gpus_per_trial, 0 <= self.gpus_per_trial <= 1, "between 0 and 1")


def plan_trials(config: SweepConfig, extra: Sequence[str]) -> list[Trial]:
    """All trials, seed by seed, so that there is soon something to compare.

    Raises:
        RunError, UnknownEnvironment, NotInstalled, SystemExit: one of them could not run.
    """
    preset = ("full" if config.gpus_per_trial else "quick") if config.preset == "auto" else config.preset
    plans = []
    for env in config.envs:
        resolve(env).check_installed()
        for agent in config.agents:
            # the nodes decide neither device nor preset, because they may differ
            fixed = {"env": env, "agent": agent, "device": "cuda" if config.gpus_per_trial else "cpu"}
            folders = {seed: config.out.resolve() / env / f"{agent}-seed{seed}" for seed in config.seeds}
            plans.append(plan(fixed, folders, preset, extra))
    return [Trial(planned.config, planned.options) for of_seed in zip(*plans) for planned in of_seed]


def read_trials(trials: Sequence[Trial]) -> None:
    """Find out which trials have finished, and how far the others are.

    Raises:
        RunError: a folder holds something else.
    """
    for trial in trials:
        check_folder(trial.config.folder, trial.config)
        trial.look()
        if is_finished(trial.config):
            trial.status = "finished"


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray on this machine, or the cluster at an address, without its reports to the terminal and to its makers."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # next to nothing is sent between processes
            ray.init("local", include_dashboard=False, object_store_memory=100 << 20, **quiet)
        else:
            host, _, port = address.rpartition(":")
            if host and port.isdecimal():  # Ray itself would try for more than a minute
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(address, **quiet)
    except SystemExit as end:  # by a handler of SIGTERM that ray.init sets
        raise KeyboardInterrupt from end
    except Exception as error:  # Ray's, the operating system's, or of the network
        where = "on this machine" if address is None else f"at {address}"
        raise RunError(f"no Ray {where}: {str(error).strip().partition(chr(10))[0]}") from error
    signal.signal(signal.SIGTERM, handler)  # in place of Ray's
    try:
        yield
    finally:
        ray.shutdown()


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def check_nodes(config: SweepConfig, site: Site) -> None:
    """Refuse nodes that lack the folder or have other code, and trials that no node has room for.

    Raises:
        RunError: which of these.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial}
    if not any(all(node["Resources"].get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
        raise RunError(f"no node has {config.cpus_per_trial} cores and {config.gpus_per_trial:g} GPUs for a trial")
    check = ray.remote(num_cpus=0, max_retries=0)(problem_of_node)
    found = [check.options(scheduling_strategy=on_node(node["NodeID"])).remote(site) for node in nodes]
    for node, answer in zip(nodes, found):
        try:
            problem = ray.get(answer, timeout=ANSWER_WITHIN)
        except ray.exceptions.RayError as error:
            problem = f"{node['NodeManagerHostname']} cannot run this project: {last_line(error)}"
        if problem:
            raise RunError(problem)


def last_line(error: Exception) -> str:
    """What went wrong, without Ray's traceback."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


class Sweep:
    """The trials that have not finished, as tasks of Ray."""

    def __init__(self, config: SweepConfig, trials: Sequence[Trial], site: Site) -> None:
        self.config, self.trials, self.site = config, trials, site
        self.scores = Scores(trials)
        self.stop_requested = False
        here = ray.get_runtime_context().get_node_id()
        board: Any = ray.remote(num_cpus=0)(Board)
        self.board = board.options(scheduling_strategy=on_node(here)).remote()
        ray.get(self.board.last_starts.remote())  # before trials begin: nobody would hear of one that dies too soon
        self.task = ray.remote(
            num_cpus=config.cpus_per_trial,
            num_gpus=config.gpus_per_trial,
            max_retries=-1,  # if the process or its node dies; what the run itself reports comes back as an Outcome
            max_calls=1,  # nothing is left of a trial when the next one begins
        )(train_trial)
        self.tasks = {self._submit(trial): trial for trial in trials if trial.status != "finished"}
        self.starts: dict[str, int] = {}
        self.write_after = 0.0

    def _submit(self, trial: Trial) -> Any:
        trial.status = "waiting"
        options, folder = trial.options, trial.config.folder
        return self.task.remote(trial.name, options, folder, self.site, self.config.cpus_per_trial, self.board)

    def run(self) -> None:
        """Until all trials have ended or a signal comes; then those that run stop with a checkpoint.

        Raises:
            RunError: a node joined that cannot take part.
        """
        self.handlers = handle_stops(self.request_stop)
        try:
            with progress.bar(desc="sweep", total=len(self.trials), unit="trial", miniters=0) as bar:
                changed = True
                while self.tasks and not self.stop_requested:
                    changed |= self.step()
                    self.show(bar)
                    if changed and time.monotonic() > self.write_after:
                        self.write()
                        changed = False
        finally:
            self.stop()
            self.write()
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)

    def step(self) -> bool:
        """Wait a moment, then see what has happened; returns whether the table has changed."""
        tasks = list(self.tasks)
        ended, _ = ray.wait(tasks, num_returns=len(tasks), timeout=LOOK_EVERY)
        problems = [self._end(self.tasks.pop(task), outcome_of(task)) for task in ended]
        if any(problems):
            raise RunError(next(filter(None, problems)))
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        changed, given_up = bool(ended), {}
        last_starts: dict[str, Start] = ray.get(self.board.last_starts.remote())
        for task, trial in self.tasks.items():
            if (name := trial.name) not in last_starts:
                continue
            start = last_starts[name]
            trial.status = "running" if start.node in alive else "waiting"
            changed |= trial.look()
            if start.starts > self.starts.get(name, 1):
                tqdm.write(f"again      {name}, from step {start.step:,}: its process or its node had died")
            self.starts[name] = start.starts
            if start.in_vain >= MOST_IN_VAIN:
                given_up[task] = f"its process or node died {MOST_IN_VAIN} times in a row at step {start.step}"
        for task, problem in given_up.items():
            ray.cancel(task, force=True)
            self._end(self.tasks.pop(task), Outcome(Exit.FAILED, problem))
        return changed or bool(given_up)

    def _end(self, trial: Trial, outcome: Outcome) -> str:
        """Note how a trial ended; returns why no trial can run where this one was to run, if that is why."""
        trial.look()
        if outcome.code == UNFIT:
            return outcome.error
        if outcome.code == Exit.STOPPED:  # by somebody else: its node is being shut down, perhaps
            self.tasks[self._submit(trial)] = trial
            return ""
        trial.status = "failed" if outcome.code else "finished"
        if outcome.code:
            trial.error = outcome.error or f"exit code {outcome.code}"
            tqdm.write(f"failed     {trial.name}: {trial.error}")
        else:
            tqdm.write(f"finished   {trial.name}, score {trial.latest}")
        return ""

    def stop(self) -> None:
        """Stop the trials that run, each with a checkpoint."""
        for task in self.tasks:
            ray.cancel(task)
        tasks = list(self.tasks)
        ended, _ = ray.wait(tasks, num_returns=len(tasks), timeout=GRACE) if tasks else ([], [])
        for task, trial in self.tasks.items():
            trial.look()
            trial.status = "finished" if task in ended and outcome_of(task).code == 0 else "waiting"

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler; a second signal stops at once."""
        signal.signal(signum, self.handlers[signum])
        tqdm.write("stopping; the trials that run write a checkpoint first; once more to stop at once")
        self.stop_requested = True

    def show(self, bar: tqdm) -> None:
        going = [trial for trial in self.tasks.values() if trial.status == "running"]
        failed = sum(trial.status == "failed" for trial in self.trials)
        bar.n = len(self.trials) - len(self.tasks)
        counts = f"{len(going)} running, {len(self.tasks) - len(going)} waiting, {failed} failed"
        shown = "".join(f"; {t.name} {t.step:,}/{t.last_step:,} {t.latest}".rstrip() for t in going[:4])
        bar.set_postfix_str(counts + shown, refresh=False)
        bar.update(0)

    def write(self) -> None:
        began = time.monotonic()
        write_tables(self.config.out, self.scores)
        # a large sweep changes all the time: spend a tenth of it on drawing
        self.write_after = time.monotonic() + 9 * (time.monotonic() - began)


def outcome_of(task: Any) -> Outcome:
    """How a task ended that has ended."""
    try:
        outcome: Outcome = ray.get(task)
    except ray.exceptions.TaskCancelledError:
        return Outcome(Exit.STOPPED)
    except ray.exceptions.RayError as error:
        return Outcome(Exit.FAILED, last_line(error))
    return outcome


def write_tables(folder: Path, scores: Scores) -> None:
    from train.outputs.scores_picture import draw_scores  # takes a second to import

    write_whole(folder / "sweep.md", scores.markdown())
    write_whole(folder / "sweep.csv", scores.csv())
    write_whole(folder / "sweep.png", draw_scores(scores))


def train_all(config: SweepConfig, trials: Sequence[Trial]) -> bool:
    """Train what has not finished; returns whether a signal stopped it."""
    for left in config.out.glob(f"{MARK}*"):  # by a sweep that was killed
        left.unlink()
    site = Site(config.out.resolve() / f"{MARK}{uuid.uuid4().hex}", version())
    site.mark.touch()
    try:
        with connected(config.address):
            check_nodes(config, site)
            sweep = Sweep(config, trials, site)
            sweep.run()
            return sweep.stop_requested
    finally:
        site.mark.unlink(missing_ok=True)


def parse(argv: Sequence[str]) -> SweepConfig:
    return options.parse(SweepConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    arguments, extra = options_behind(sys.argv[1:] if argv is None else argv)
    config = parse(arguments)
    refusals = (RunError, UnknownEnvironment, NotInstalled, OSError)
    again = "the same command continues from the last checkpoints"
    return console.conclude(lambda: sweep(config, extra), config, refusals, again)


def sweep(config: SweepConfig, extra: Sequence[str]) -> Ending:
    stopped = False
    trials = plan_trials(config, extra)
    with lock_folders([config.out]):
        read_trials(trials)
        if any(trial.status != "finished" for trial in trials):
            stopped = train_all(config, trials)
        scores = Scores(trials)
        write_tables(config.out, scores)
    text = f"\n{(config.out / 'sweep.md').read_text()}\nin {config.out}: sweep.md, sweep.csv, sweep.png"
    document = {"folder": config.out, "seeds": config.seeds, **scores.document()}
    if stopped:
        error = "stopped; the same command continues"
        return Ending(text, {**document, "error": error}, Exit.STOPPED)
    return Ending(text, document, Exit.FAILED if any(trial.status == "failed" for trial in trials) else Exit.DONE)


if __name__ == "__main__":
    console.start(main)
