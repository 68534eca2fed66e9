"""Train an offline RL agent and evaluate it: ``python train/run.py --env halfcheetah-medium-expert``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeAlias

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from train.agents import AGENTS
from train.agents.base import Agent, Learner, Parts
from train.agents.seeds import SeedGroup
from train.capture import CapturedUpdate, CaptureError
from train.checkpoint import newest_checkpoints, write_whole
from train.curve import draw_group_curve
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable, EnvSpec
from train.data.transitions import Batch, OfflineDataset
from train.environments import UnknownEnvironment, resolve
from train.member import Member, RunError
from train.memory import keep_freed_memory
from train.presets import choose_preset, preset_config
from train.profiling import ProfiledUpdate
from train.report import evaluation_line, final_table, group_table
from train.settings import MAY_CHANGE_ON_RESUME, RunConfig

Update: TypeAlias = Callable[[Parts, bool], tuple[Batch, dict[str, Tensor]]]


class Stage(NamedTuple):
    name: str
    start: int
    end: int


class Run:
    """Data, agents and optimiser of one run, and the loop over them. Several seeds are several members."""

    def __init__(self, config: RunConfig, spec: EnvSpec, dataset: OfflineDataset, device: torch.device) -> None:
        self.config, self.spec = config, spec
        if config.standardize_observations:
            mean, std = dataset.observations.mean(0), dataset.observations.std(0) + 1e-3
        else:
            mean, std = torch.zeros(dataset.observations.shape[1]), torch.ones(dataset.observations.shape[1])
        self.dataset = dataclasses.replace(
            dataset,
            observations=(dataset.observations - mean) / std,
            next_observations=(dataset.next_observations - mean) / std,
            rewards=dataset.rewards / dataset.rewards.std() if config.scale_rewards else dataset.rewards,
        ).to(device)
        self.warmup_dataset = self.dataset
        if config.critic_warmup and config.critic_warmup_n_step > 1:
            self.warmup_dataset = self.dataset.n_step(config.critic_warmup_n_step, config.hyper.discount)
        configs = config.of_each_seed()
        agents = [self._make_agent(single.seed, mean, std).to(device) for single in configs]
        self.generators = [torch.Generator(device).manual_seed(single.seed) for single in configs]
        if config.num_seeds == 1:
            self.learner: Learner = agents[0]
            self.optimizer = self.learner.make_optimizer()
            optimizers = [self.optimizer]
        else:
            self.learner = group = SeedGroup(agents)
            self.optimizer = group.make_optimizer()
            optimizers = [group.optimizer_of(i, self.optimizer) for i in range(config.num_seeds)]
        self.members = [
            Member(single, spec, self.dataset, agent, optimizer, generator)
            for single, agent, optimizer, generator in zip(configs, agents, optimizers, self.generators)
        ]
        self.update = self._make_update()
        self.step = 0
        self.seconds = 0.0
        self.learning_rate = config.hyper.lr
        self.stop_requested = False

        flow_end = config.flow_warmup
        critic_end = flow_end + config.critic_warmup
        self.stages = [
            Stage("flow warm-up", 0, flow_end),
            Stage("critic warm-up", flow_end, critic_end),
            Stage(config.agent, critic_end, critic_end + config.steps),
        ]

    def _make_agent(self, seed: int, obs_mean: Tensor, obs_std: Tensor) -> Agent:
        config = self.config
        torch.manual_seed(seed)
        agent = AGENTS[config.agent](config.hyper, self.dataset.observations.shape[1], self.dataset.actions.shape[1])
        agent.obs_mean.copy_(obs_mean)
        agent.obs_std.copy_(obs_std)
        if config.center_critics:
            agent.center_critics(float(self.dataset.rewards.mean()))
        return agent

    def _make_update(self) -> Update:
        if self.config.compile:
            self.learner.compile(fullgraph=True, dynamic=False)
        update: Update = self._update
        if captures(self.config, self.generators[0].device):
            update = CapturedUpdate(update, self.generators)
        if self.config.profile:
            update = ProfiledUpdate(update, self.members[0].config.folder / "trace.json")
        return update

    def _update(self, parts: Parts, log: bool) -> tuple[Batch, dict[str, Tensor]]:
        """One update, the sampling of its batch included."""
        dataset = self.warmup_dataset if "data_critic" in parts else self.dataset
        batch, draws = self.learner.sample(dataset, self.config.batch_size, self.generators)
        return batch, self.learner.update(self.optimizer, batch, draws, parts, log=log)

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Go through the stages from the step reached so far; a checkpoint holds whatever was done when it returns."""
        for member in self.members:
            member.open_record(self.step)
        self.clock = time.perf_counter() - self.seconds
        handlers = {signum: signal.signal(signum, self.request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            for stage in self.stages:
                if stage.start <= self.step < stage.end and not self.stop_requested:
                    self._train(stage)
        finally:
            if isinstance(self.update, ProfiledUpdate):
                self.update.close()
            for member in self.members:
                member.record.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _train(self, stage: Stage) -> None:
        config, flow_end = self.config, self.stages[0].end
        critics_learn = stage is not self.stages[0]
        if critics_learn and not self.members[0].evaluations:
            self.evaluate()
        bar = tqdm(
            desc=stage.name,
            initial=self.step - stage.start,
            total=stage.end - stage.start,
            unit="update",
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        with bar:
            logged_step, logged_at = self.step, time.perf_counter()
            while self.step < stage.end and not self.stop_requested:
                done = self.step - stage.start + 1
                log = done % config.log_every == 0 or self.step + 1 == stage.end
                self.set_learning_rate(stage)
                batch, seen = self.update(self.parts(stage), log)
                self.step += 1
                bar.update()
                if log:
                    figures = self.learner.figures(batch, seen)
                    rate = (self.step - logged_step) / (time.perf_counter() - logged_at)
                    numbers = [
                        member.log(self.step, stage.name, rate, of_member)
                        for member, of_member in zip(self.members, figures)
                    ]
                    bar.set_postfix_str(postfix(numbers), refresh=False)
                    logged_step, logged_at = self.step, time.perf_counter()
                end = self.step == self.stages[-1].end
                if critics_learn and ((self.step - flow_end) % config.eval_every == 0 or end):
                    self.evaluate()
                    logged_at = time.perf_counter()
                if self.step % config.checkpoint_every == 0 or self.step == stage.end:
                    self.save()
        if self.stop_requested:
            self.save()

    def parts(self, stage: Stage) -> Parts:
        """Losses of the next update."""
        flow_warmup, critic_warmup, _ = self.stages
        if stage is flow_warmup:
            return ("flow",)
        if stage is critic_warmup:
            return ("data_critic",)
        return self.learner.agent_parts(self.step - stage.start)

    def set_learning_rate(self, stage: Stage) -> None:
        """Annealed in each warm-up, which a noisy last iterate would spoil, and for the agent if that is asked for."""
        warming_up = stage is not self.stages[-1]
        lr = self.config.warmup_lr if warming_up else self.config.hyper.lr
        if warming_up or self.config.anneal:
            progress = (self.step - stage.start) / (stage.end - stage.start)
            lr *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        if lr == self.learning_rate:
            return
        self.learning_rate = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # where a captured update reads it
            else:
                group["lr"] = lr

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: finish what is under way, write a checkpoint, leave. A second signal acts at once."""
        signal.signal(signum, signal.SIG_DFL)
        tqdm.write("stopping after this update or evaluation, with a checkpoint; once more to stop at once")
        self.stop_requested = True

    # -- what it leaves behind -----------------------------------------------------------------------------------

    def evaluate(self) -> None:
        for member in self.members:
            rows = member.evaluate(self.step, last=self.step == self.stages[-1].end)
            seed = f"seed {member.config.seed:<4}" if len(self.members) > 1 else ""
            self.seconds = time.perf_counter() - self.clock
            tqdm.write(evaluation_line(self.step, seed, rows, member.config, self.seconds / 60))
        if len(self.members) > 1:
            evaluations = [member.evaluations for member in self.members]
            draw_group_curve(self.config, evaluations, self.members[0].dataset_score, self.spec.score_label)

    def save(self) -> None:
        self.seconds = time.perf_counter() - self.clock
        for member in self.members:
            member.save(self.step, self.seconds)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint that all members have; where there is none at all, begin."""
        folders = [member.config.folder / "checkpoints" for member in self.members]
        checkpoints, problems = newest_checkpoints(folders)
        for problem in problems:
            print(f"refused    {problem}")
        if not checkpoints:
            lonely = [str(folder) for folder in folders if any(folder.glob("step-*.safetensors"))]
            if lonely:
                raise RunError(
                    f"--resume: the seeds have no checkpoint of the same step; there are some in {', '.join(lonely)}. "
                    "Finish the seeds one by one with --num-seeds 1, or begin anew with --overwrite"
                )
            print(f"resume     no checkpoint in {', '.join(str(f.parent) for f in folders)}: starting at update 0")
            return
        for member, checkpoint in zip(self.members, checkpoints):
            member.restore(checkpoint)
            print(f"resume     {checkpoint.path}, step {checkpoint.step:,}")
        self.step, self.seconds = checkpoints[0].step, checkpoints[0].notes["seconds"]

    def finish(self) -> None:
        """Weights, summary and the final table."""
        for member in self.members:
            member.finish(self.seconds)
        minutes = self.seconds / 60
        alone = len(self.members) == 1
        print(final_table(self.members[0], minutes) if alone else group_table(self.config, self.members, minutes))
        if isinstance(self.update, ProfiledUpdate):
            print(self.update.outcome)


def captures(config: RunConfig, device: torch.device) -> bool:
    """Whether updates are to be replayed as CUDA graphs."""
    if config.capture == "on" and device.type != "cuda":
        raise RunError(f"--capture on: CUDA graphs need a CUDA device, and this run is on {device}")
    return config.capture != "off" and device.type == "cuda"


def update_line(config: RunConfig, device: torch.device) -> str:
    how = "compiled" if config.compile else "plain"
    if captures(config, device):
        return f"{how}, replayed as CUDA graphs"
    return how + (", no CUDA graphs (--capture off)" if device.type == "cuda" else ", no CUDA graphs on the CPU")


def postfix(numbers: list[dict[str, float]]) -> str:
    """The figures that fit behind a progress bar, means over the members."""
    shown = {"flow": "flow_loss", "td": "critic_loss", "penalty": "penalty", "α": "alpha", "Q": "q_policy"}
    shown |= {"‖δ‖": "displacement_norm", "λ₁/Σλ": "top_eigenvalue_share"}
    means = {name: sum(row[name] for row in numbers) / len(numbers) for name in numbers[0]}
    return " ".join(f"{label}={means[name]:.3g}" for label, name in shown.items() if name in means)


def parse(argv: Sequence[str]) -> RunConfig:
    """The command line, on top of the preset that it asks for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?", help=argparse.SUPPRESS)
    first.add_argument("--preset", default="auto")
    first.add_argument("--agent", default="fidec")
    first.add_argument("--device", default="auto")
    known, _ = first.parse_known_args(argv)
    # a misspelt preset or agent is left to tyro, which names the choices, and a misspelt environment to `resolve`
    default = preset_config(choose_preset(known.preset, known.device), known.agent, known.env)
    return tyro.cli(RunConfig, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))


def preset_line(config: RunConfig) -> str:
    name = choose_preset(config.preset, config.device)
    if config.preset == "auto":
        name += " (on a GPU)" if name == "full" else " (no GPU in use; --preset full is the published setting)"
    hyper = config.hyper
    return (
        f"{name}: {config.flow_warmup:,} + {config.critic_warmup:,} warm-up and {config.steps:,} agent updates, batch "
        f"{config.batch_size}, actors {'-'.join(map(str, hyper.actor_hidden))}, critics "
        f"{'-'.join(map(str, hyper.critic_hidden))}, {hyper.flow_steps} flow steps"
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device must be auto, cpu or cuda, got {name}")
    return device


LEFT_BY_A_RUN = (
    *("config.json", "metrics.csv", "evaluations.csv", "curve.png", "policy.safetensors", "result.json"),
    *("trace.json", "trace.txt", "checkpoints", "tensorboard"),
)


def check_folder(folder: Path, config: RunConfig) -> None:
    """Never mix two runs in one folder, never lose one, never touch what no run made."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        before = json.loads((folder / "config.json").read_text())
        before |= before.pop("hyper")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is there and no run made it (no config.json of ours): use another --out") from error
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} already holds a run: --resume continues it, --overwrite deletes it, --out DIR avoids it"
        )
    if config.resume:
        now = config.as_json()
        now |= now.pop("hyper")
        may_change = MAY_CHANGE_ON_RESUME - ({"steps"} if config.anneal else set())
        changed = [name for name in now if name not in may_change and now[name] != before.get(name)]
        if changed:
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            raise RunError(f"--resume: the run in {folder} was started with {was}")


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder of the run and write its settings there."""
    if config.overwrite and not config.resume:
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(config.as_json(), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(sys.argv[1:] if argv is None else argv)
    try:
        spec = resolve(config.env)
        device = choose_device(config.device)
        keep_freed_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision(config.matmul_precision)
            # the first updates run without a graph, all of them with --capture off
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        singles = config.of_each_seed()
        for single in singles:
            check_folder(single.folder, single)
        seeds = f"seed {config.seed}" + (f" to {singles[-1].seed}" if len(singles) > 1 else "")
        how = update_line(config, device)
        print(f"run        {config.agent} on {config.env} ({spec.env_id}), {seeds}, {device}")
        print(f"preset     {preset_line(config)}")
        print(f"update     {how}")
        print(f"folder     {' ... '.join(dict.fromkeys(str(s.folder) for s in (singles[0], singles[-1])))}", flush=True)
        dataset = load_dataset(spec, size=config.dataset_size)
        for line in dataset.source:
            print(f"data       {line}")
        for single in singles:
            prepare_folder(single.folder, single)
        run = Run(config, spec, dataset, device)
        if config.resume:
            run.resume()
        sys.stdout.flush()
        run.train()
    except (UnknownEnvironment, DatasetUnavailable, RunError, CaptureError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training, or a second one during it
        print("stopped", file=sys.stderr)
        return 130
    if run.stop_requested:
        print(f"stopped at step {run.step:,}; --resume continues from there")
        return 130
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
