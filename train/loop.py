"""The loop of a run: its stages from the first update to the last, with evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from fdkernels.policy.finite import NotFinite
from train import processes, progress
from train.agents import AGENTS
from train.agents.base import ALL_PARTS, Agent, Learner, Parts
from train.agents.seeds import SeedGroup
from train.capture import CapturedUpdate
from train.data.replay import Replay
from train.data.spec import EnvSpec
from train.data.transitions import Batch, OfflineDataset
from train.health import FirstUnsound, Wrong, sound, unsound
from train.member import Member
from train.online import Explorer
from train.outputs.checkpoint import Checkpoint, newest_checkpoints, newest_step
from train.outputs.diverged import Diverged, FailedUpdate, without_diverged
from train.outputs.report import evaluation_line, final_table, group_table
from train.outputs.result import Result
from train.profiling import ProfiledUpdate
from train.settings import RunConfig, RunDiverged, RunError, check_observations
from train.signals import handle_stops

LARGEST_SCALED = 1e18
"""Beyond this, squares are near the end of float32."""
Update: TypeAlias = Callable[[Parts, bool], tuple[Batch, dict[str, Tensor]]]


class Stage(NamedTuple):
    name: str
    start: int
    end: int


class Run:
    """Data, agents and optimiser of one run, and its training loop. Each seed is a member."""

    def __init__(self, config: RunConfig, spec: EnvSpec, dataset: OfflineDataset, device: torch.device) -> None:
        self.config, self.spec, self.place = config, spec, processes.place()
        check_data(config, dataset)
        if config.hyper.encoder != "none":
            dataset = dataset.stack_frames(config.hyper.frame_stack)
        shape = dataset.observation_shape
        mean, std = torch.zeros(shape), torch.ones(shape)
        if config.standardize_observations:
            observations = dataset.observations
            mean, std = observations.mean(0), observations.std(0) + 1e-3
            del observations
            dataset = dataclasses.replace(dataset, states=(dataset.states - mean).div_(std))
        reward_std = torch.ones(())
        if config.scale_rewards:
            reward_std = dataset.rewards.std()
            dataset = dataclasses.replace(dataset, rewards=dataset.rewards / reward_std)
        self.dataset = dataset.to(device)
        found = without_diverged(config) if self.place.leads else None
        configs, self.left_out = processes.from_leader(found) or ([], [])
        agents = [self._make_agent(single.seed, mean, std).to(device) for single in configs]
        self.generators = [torch.Generator(device).manual_seed(single.seed) for single in configs]
        if config.num_seeds == 1:
            self.learner: Learner = agents[0]
            self.optimizer = self.learner.make_optimizer()
            optimizers = [self.optimizer]
        else:
            self.learner = group = SeedGroup(agents)
            self.optimizer = group.make_optimizer()
            optimizers = [group.optimizer_of(i, self.optimizer) for i in range(len(agents))]
        self.members = [
            Member(Result(single, spec, self.dataset), agent, optimizer, generator)
            for single, agent, optimizer, generator in zip(configs, agents, optimizers, self.generators)
        ]

        @functools.cache
        def over(steps: int) -> OfflineDataset:
            return self.dataset.n_step(steps, config.hyper.discount) if steps > 1 else self.dataset

        self.warmup_dataset = over(config.critic_warmup_n_step) if config.critic_warmup else self.dataset
        source = over(config.n_step)
        self.source: OfflineDataset | Replay = source
        """What updates sample from, except in the critics' warm-up."""
        if config.online_steps:
            (member,) = self.members
            replay = Replay(source, config.online_steps, config.replay, config.n_step, config.hyper.discount)
            member.explorer = Explorer(
                spec.env_id, member.agent, config.acts_online, member.generator, replay, reward_std, config.seed
            )
        self.first_unsound = FirstUnsound(len(self.members), device)
        self.captured: CapturedUpdate[tuple[Batch, dict[str, Tensor]]] | None = None
        self.update = self._make_update()
        self.step = 0
        self.seconds = 0.0
        self.learning_rate = config.hyper.lr
        self.stop_requested = False
        self.stopped = False
        """Whether it ended early, by a signal to any of its processes."""

        flow_end, offline_end = config.flow_warmup, config.offline_steps
        critic_end = flow_end + config.critic_warmup
        self.online = Stage("online", offline_end, offline_end + config.online_steps)
        self.stages = [
            Stage("flow warm-up", 0, flow_end),
            Stage("critic warm-up", flow_end, critic_end),
            Stage(config.agent, critic_end, offline_end),
            self.online,
        ]

    def _make_agent(self, seed: int, obs_mean: Tensor, obs_std: Tensor) -> Agent:
        config = self.config
        torch.manual_seed(seed)
        shape = self.dataset.observation_shape
        agent = AGENTS[config.agent](config.hyper, shape, self.dataset.actions.shape[1])
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
            self.captured = update = CapturedUpdate(update, self.generators)
        if self.config.profile and self.place.leads:
            update = ProfiledUpdate(update, self.members[0].config.folder / "trace.json")
        return update

    def _update(self, parts: Parts, log: bool) -> tuple[Batch, dict[str, Tensor]]:
        """Sample a batch and make one update, unless its numbers went wrong."""
        dataset = self.warmup_dataset if "data_critic" in parts else self.source
        batch, draws = self.learner.sample(dataset, self.config.batch_size, self.generators)
        seen = self.learner.backward(batch, draws, parts, log=log)
        norms = self.learner.gradient_norms()
        healthy = sound(self.learner.losses, norms)
        if self.captured is not None:
            self.first_unsound.note(healthy)
        elif self._lose_unsound(healthy, FailedUpdate(batch, draws, parts)):
            norms = self.learner.gradient_norms()  # without those that were lost
        self.learner.step(self.optimizer, parts, norms)
        return batch, seen

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train through the remaining stages. At the end, a checkpoint holds the result."""
        self._check_agreement()
        for member in self.members if self.place.leads else ():
            member.open_record(self.step)
        self.first_unsound.begin(self.step)
        self.clock = time.perf_counter() - self.seconds
        handlers = handle_stops(self.request_stop)
        try:
            for stage in self.stages:
                if stage.start <= self.step < stage.end and not self._stops():
                    self._train(stage)
        finally:
            if isinstance(self.update, ProfiledUpdate):
                self.update.close()
            for member in self.members:
                if member.record is not None:
                    member.record.close()
            if self.place.total == 1:  # else torchrun's signal at the end of another process could cut this one short
                for signum, handler in handlers.items():
                    signal.signal(signum, handler)

    def _train(self, stage: Stage) -> None:
        config, flow_end = self.config, self.stages[0].end
        critics_learn = stage is not self.stages[0]
        explorer = self._go_online() if stage is self.online else None
        evaluated = [row["step"] for row in self.alive[0].result.evaluations]
        # the agent that goes online is always evaluated
        if critics_learn and (not evaluated or self.step == self.online.start != evaluated[-1]):
            self.evaluate()
        extent = {"initial": self.step - stage.start, "total": stage.end - stage.start}
        with progress.bar(desc=stage.name, unit="update", shown=self.place.leads, **extent) as bar:
            logged_step, logged_at = self.step, time.perf_counter()
            while self.step < stage.end and not self._stops():
                done = self.step - stage.start + 1
                log = done % config.log_every == 0 or self.step + 1 == stage.end
                self.set_learning_rate(stage)
                if explorer is not None:
                    self._explore(explorer)
                batch, seen = self.update(self.parts(stage), log)
                self.step += 1
                bar.update()
                if log:
                    self._check_agreement()
                    rate = (self.step - logged_step) / (time.perf_counter() - logged_at)
                    numbers = self._log(stage, rate, batch, seen)
                    bar.set_postfix_str(postfix(numbers), refresh=False)
                    logged_step, logged_at = self.step, time.perf_counter()
                end = self.step == self.stages[-1].end
                if critics_learn and ((self.step - flow_end) % config.eval_every == 0 or end):
                    self.evaluate()
                    logged_at = time.perf_counter()
                if self.step % config.checkpoint_every == 0 or self.step == stage.end:
                    self.save()
        if self.stopped:
            self.save()

    def _stops(self) -> bool:
        """Whether to stop now: a signal reaches one process earlier than another, and they must do so together."""
        self.stopped = self.stopped or processes.any_of(self.stop_requested)
        return self.stopped

    def _of_whole_batch(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The figures of this process's rows, averaged over all processes."""
        rows = len(range(self.config.batch_size)[processes.own_rows(self.config.batch_size)])
        return dict(zip(figures, processes.batch_means(list(figures.values()), rows)))

    def _check_agreement(self) -> None:
        """Refuse to go on if the processes have different data, parameters or random numbers."""
        if self.place.total == 1:
            return
        told = [self.step, [member.result.data_identity for member in self.members]]
        if not processes.agree(json.dumps(told).encode()):
            raise RunError(f"the processes of this run have different data; process {self.place.rank} has {told}")
        states = [*self.learner.state_dict().values(), *(generator.get_state() for generator in self.generators)]
        if not processes.agree(b"".join(state.cpu().numpy().tobytes() for state in states)):
            raise RunError(
                f"at step {self.step} the processes have different parameters or random numbers; they must run on "
                "processors, or GPUs, of one kind"
            )

    def _log(self, stage: Stage, rate: float, batch: Batch, seen: dict[str, Tensor]) -> list[dict[str, float]]:
        """Write a row for each member whose numbers are sound; returns their figures."""
        self.check()
        rows = []
        for i, (member, figures) in enumerate(zip(self.members, self.learner.figures(batch, seen))):
            if member.diverged is not None:
                continue
            row = member.log(self.step, stage.name, rate, self._of_whole_batch(figures))
            broken = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
            if broken:  # a figure that is no part of the losses
                self.lose(i, self.step, {"metrics": broken})
            else:
                rows.append(row)
        return rows

    def _explore(self, explorer: Explorer) -> None:
        """One step in the environment."""
        try:
            explorer.step()
        except NotFinite as error:
            self.lose(0, self.step + 1, {"environment": [str(error)]})

    def _go_online(self) -> Explorer:
        """From here on updates sample from the replay."""
        explorer = self.members[0].explorer
        assert explorer is not None
        self.source = explorer.replay
        if self.captured is not None:
            self.captured.forget()
        return explorer

    def parts(self, stage: Stage) -> Parts:
        """The losses of the next update."""
        flow_warmup, critic_warmup, agent, online = self.stages
        if stage is flow_warmup:
            return ("flow",)
        if stage is critic_warmup:
            return ("data_critic",)
        if stage is online:
            # What was frozen offline learns from what is seen. A flow that does not is not even here as frozen_flow,
            # because Adam's momentum would still move it.
            return ("critic", "actor") if self.config.freeze_flow_online else ALL_PARTS
        return self.learner.agent_parts(self.step - agent.start)

    def set_learning_rate(self, stage: Stage) -> None:
        """Anneal it in each warm-up, whose last iterate would otherwise be noisy, and for the agent if ``anneal``."""
        config, warming_up = self.config, stage in self.stages[:2]
        lr = config.warmup_lr if warming_up else config.hyper.lr
        if stage is self.online:
            lr = config.online_lr or lr
        elif warming_up or config.anneal:
            progress = (self.step - stage.start) / (stage.end - stage.start)
            lr *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        if lr == self.learning_rate:
            return
        self.learning_rate = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # in place, because a captured update reads it there
            else:
                group["lr"] = lr

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: stop with a checkpoint after this update or evaluation. A second signal stops at once."""
        self.stop_requested = True
        if self.place.total > 1:  # torchrun passes on a signal that may have come already, and ends with SIGKILL
            tqdm.write("stopping after this update or evaluation, with a checkpoint")
            return
        signal.signal(signum, signal.SIG_DFL)
        tqdm.write("stopping after this update or evaluation, with a checkpoint; once more to stop at once")

    # -- numbers that go wrong -----------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Member]:
        """The members whose numbers are sound."""
        return [member for member in self.members if member.diverged is None]

    @property
    def diverged(self) -> list[Diverged]:
        """The seeds whose numbers went wrong, now or before the run was resumed."""
        return [*self.left_out, *(member.diverged for member in self.members if member.diverged is not None)]

    def _lose_unsound(self, healthy: Tensor, update: FailedUpdate) -> bool:
        """Lose the members whose gradients must not be applied; returns whether there were any."""
        lost = [i for i in unsound(healthy) if self.members[i].diverged is None]
        for i in lost:
            batch, draws = self.learner.share(i, update.batch, update.draws)
            of_member = FailedUpdate(processes.whole_batch(batch), processes.whole_batch(draws), update.parts)
            found = self.members[i].inspect(of_member, self.learner.gradients_of(i))
            self.lose(i, self.step + 1, found, of_member)
        return bool(lost)

    def check(self) -> None:
        """Lose the members whose parameters, Adam's moments or captured updates went wrong."""
        first = self.first_unsound.read()
        for i, member in enumerate(self.members):
            if member.diverged is not None:
                continue
            if found := member.wrong_state() or ({"updates": ["a loss or a gradient"]} if first[i] else {}):
                self.lose(i, first[i] or self.step, found)

    def lose(self, i: int, at: int, found: Wrong, update: FailedUpdate | None = None) -> None:
        """Save the state of a member whose numbers went wrong. The others go on without it.

        Raises:
            RunDiverged: there are no others.
        """
        stage = next(stage for stage in reversed(self.stages) if stage.start < max(at, 1))
        diverged = self.members[i].diverge(at, stage.name, found, update)
        processes.wait_for_leader()
        message = diverged.report(in_a_graph=self.first_unsound.read()[i] > 0, group=self.config.num_seeds > 1)
        if not self.alive:
            seeds = ", ".join(str(of_seed.seed) for of_seed in self.diverged)
            raise RunDiverged(message + (f"\nall seeds diverged: {seeds}" if self.config.num_seeds > 1 else ""))
        tqdm.write(f"{message}\nthe other seeds go on")
        assert isinstance(self.learner, SeedGroup)
        self.learner.leave_out(i, self.optimizer)

    # -- results and checkpoints ---------------------------------------------------------------------------------

    def evaluate(self) -> None:
        interim = self.step not in (self.online.start, self.online.end)
        self.check()
        for i, member in enumerate(self.members):
            if member.diverged is not None:
                continue
            played = self._evaluated(member, interim) if self.place.leads else ({}, "")
            rows, problem = processes.from_leader(played)
            if problem:
                self.lose(i, self.step, {"evaluation": [problem]})
                continue
            if not self.place.leads:
                member.result.evaluations += rows.values()
                continue
            seed = f"seed {member.config.seed:<4}" if self.config.num_seeds > 1 else ""
            self.seconds = time.perf_counter() - self.clock
            tqdm.write(evaluation_line(self.step, seed, rows, member.config, self.seconds / 60))
        if self.config.num_seeds > 1 and self.place.leads:
            from train.outputs.curve import draw_group_curve

            results = [member.result for member in self.alive]
            evaluations = [result.evaluations for result in results]
            score, label = results[0].dataset_score, self.spec.score_label
            draw_group_curve(self.config, evaluations, score, label, self.diverged)

    def _evaluated(self, member: Member, interim: bool) -> tuple[dict[str, dict[str, Any]], str]:
        """The rows of an evaluation, or what was not finite in it."""
        try:
            return member.evaluate(self.step, interim=interim), ""
        except NotFinite as error:
            return {}, str(error)

    def save(self) -> None:
        self.check()
        self.seconds = time.perf_counter() - self.clock
        for member in self.alive if self.place.leads else ():
            member.save(self.step, self.seconds)

    def resume(self) -> None:
        """Continue from the newest intact checkpoint that all members share; start anew if there is none at all.

        Raises:
            RunError: there are some, and none of them will do. Nothing was deleted.
        """
        for diverged in self.left_out:
            print(f"left out   {diverged}")
        if self.config.num_seeds == 1 and self.place.leads:
            self.members[0].recall_divergence()
        folders = [member.config.checkpoints for member in self.members]
        found: tuple[list[Checkpoint], list[str], list[str]] = ([], [], [])
        if self.place.leads:
            found = *newest_checkpoints(folders), [str(folder) for folder in folders if newest_step(folder)]
        checkpoints, problems, some = processes.from_leader(found)
        for problem in problems:
            print(f"refused    {problem}")
        if not checkpoints:
            if some and len(folders) > 1:
                raise RunError(
                    f"--resume: the seeds have no intact checkpoint of the same step; there are some in "
                    f"{', '.join(some)}. Finish the seeds one by one with --num-seeds 1, or delete these to begin anew"
                )
            if some:
                raise RunError(f"--resume: no checkpoint in {some[0]} is intact; delete that folder to begin anew")
            print(f"resume     no checkpoint in {', '.join(str(f.parent) for f in folders)}: starting at update 0")
            return
        for member, checkpoint in zip(self.members, checkpoints):
            member.restore(checkpoint)
            print(f"resume     {checkpoint.path}, step {checkpoint.step:,}")
        self.step, self.seconds = checkpoints[0].step, checkpoints[0].notes["seconds"]

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Write weights and summary; returns the final table, and what it shows as in result.json."""
        if not self.place.leads:
            return "", {}
        summaries = [member.finish(self.seconds) for member in self.alive]
        minutes, results = self.seconds / 60, [member.result for member in self.alive]
        if isinstance(self.update, ProfiledUpdate):
            print(self.update.outcome)
        if self.config.num_seeds == 1:
            return final_table(results[0], minutes), summaries[0]
        lost = [{"seed": of_one.seed, "update": of_one.update, "found": of_one.found} for of_one in self.diverged]
        return group_table(self.config, results, minutes, self.diverged), {"seeds": summaries, "diverged": lost}


def check_data(config: RunConfig, dataset: OfflineDataset) -> None:
    """Refuse settings that do not fit the data, before anything of an earlier run is overwritten.

    Raises:
        RunError: see `check_observations`; or equal rewards are to be scaled, or numbers too large for it.
    """
    check_observations(config, dataset.states.shape[1:])
    if config.scale_rewards and dataset.rewards.std() == 0:
        raise RunError("--scale-rewards divides by the rewards' standard deviation, and all rewards are equal")
    for flag, column, scaled in (
        ("--scale-rewards", dataset.rewards, config.scale_rewards),
        ("--standardize-observations", dataset.states, config.standardize_observations),
    ):
        if scaled and (largest := max(map(abs, torch.stack(column.aminmax()).tolist()))) > LARGEST_SCALED:
            raise RunError(f"{flag}: numbers up to {largest:.3g} have no standard deviation in float32")


def captures(config: RunConfig, device: torch.device) -> bool:
    """Whether updates are to be replayed as CUDA graphs."""
    if config.capture == "on" and device.type != "cuda":
        raise RunError(f"--capture on: CUDA graphs need a CUDA device, and this run is on {device}")
    several = processes.as_started().total > 1
    if config.capture == "on" and several:
        raise RunError("--capture on: CUDA graphs of an update in several processes have not been tried on GPUs yet")
    return config.capture != "off" and device.type == "cuda" and not several


def postfix(numbers: list[dict[str, float]]) -> str:
    """Figures to show beside the progress bar, averaged over the members."""
    shown = {"flow": "flow_loss", "td": "critic_loss", "penalty": "penalty", "α": "alpha", "Q": "q_policy"}
    shown |= {"‖δ‖": "displacement_norm", "λ₁/Σλ": "top_eigenvalue_share", "return": "online_return"}
    means = {name: sum(row[name] for row in numbers) / len(numbers) for name in numbers[0]}
    return " ".join(f"{label}={means[name]:.3g}" for label, name in shown.items() if name in means)
