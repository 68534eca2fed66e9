"""One agent of a run, with its optimiser, its generator, its environment if it goes online, and its output folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train import processes
from train.agents.base import Agent
from train.evaluate import evaluate
from train.health import Wrong, gradient_numbers, inspect, state_numbers, wrong
from train.online import ONLINE_METRICS, Explorer
from train.outputs.best import keep_best, prune_best, save_best
from train.outputs.checkpoint import Checkpoint, save_checkpoint, state_tensors
from train.outputs.diverged import FILE, Diverged, DivergedError, FailedUpdate, read_diverged, save_diverged
from train.outputs.notes import check_notes
from train.outputs.policy import save_policy
from train.outputs.record import Record
from train.outputs.result import Result
from train.reading import shown
from train.settings import RunError


class Member:
    """An agent with its optimiser and generator; ``result.config`` is the configuration that trains it alone."""

    explorer: Explorer | None = None
    """Plays its training episodes, if it goes online."""
    record: Record | None = None
    """Its open files; None in processes that do not write them."""
    diverged: Diverged | None = None
    """Set when its numbers went wrong."""
    stopped_at: int | None = None
    """The update at which an earlier attempt diverged."""

    def __init__(
        self, result: Result, agent: Agent, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self.result, self.config = result, result.config
        self.agent, self.optimizer, self.generator = agent, optimizer, generator

    def open_record(self, step: int) -> None:
        evaluated = {row["step"] for row in self.result.evaluations}
        keep_best(self.config.checkpoints, evaluated)
        metrics = (*self.agent.metric_names, *ONLINE_METRICS)
        self.record = Record(self.config.folder, step, self.result.evaluations, metrics)

    def log(self, step: int, stage: str, updates_per_second: float, figures: Mapping[str, Tensor]) -> dict[str, float]:
        """Write a row of metrics, and return the metrics as numbers."""
        numbers = {name: value.item() for name, value in figures.items()}
        if self.explorer is not None:
            numbers |= self.explorer.report()
        if self.record is not None:
            self.record.add_metrics(step, stage, updates_per_second, numbers)
        return numbers

    def evaluate(self, step: int, *, interim: bool) -> dict[str, dict[str, Any]]:
        """Play episodes, write a row for each of the `ROLES`, and redraw the curve."""
        from train.outputs.curve import draw_curve  # takes a second to import, and most programs end without it

        assert self.record is not None
        config, spec = self.config, self.result.spec
        played = evaluate(
            self.agent,
            spec.env_id,
            config.acts,
            episodes=(config.interim_episodes if interim else None) or config.eval_episodes,
            seed=config.evaluation_seed,
        )
        rows = self.result.add(step, played)
        if self.result.last_and_best["policy"]["best"] is rows["policy"]:
            save_best(config, self.agent, step)
        for row in rows.values():
            self.record.add_evaluation(row)
        draw_curve(config.folder, config, self.result.dataset_score, spec.score_label)
        return rows

    def save(self, step: int, seconds: float) -> None:
        evaluations = self.result.evaluations
        notes = {"data": self.result.data_identity, "evaluations": evaluations, "seconds": seconds}
        seen = None
        if self.explorer is not None and self.explorer.episodes:
            notes["online"], seen = self.explorer.notes(), self.explorer.replay.tensors()
        assert self.record is not None
        self.record.sync()
        folder = self.config.checkpoints
        save_checkpoint(folder, step, self.agent, self.optimizer, self.generator, notes, seen)
        prune_best(folder)
        if self.stopped_at is not None and step >= self.stopped_at:
            (self.config.folder / FILE).unlink(missing_ok=True)  # this time it got past that update

    def wrong_state(self) -> Wrong:
        """Which of the agent's and the optimiser's numbers went wrong."""
        everything = [*self.agent.state_dict().values(), *self._moments.values()]
        if nn.utils.get_total_norm(everything).isfinite():  # which is faster than to look at each
            return {}
        return wrong(state_numbers(self.agent, self._moments))

    def inspect(self, update: FailedUpdate, gradients: Mapping[str, Tensor]) -> Wrong:
        """What went wrong in an update whose gradients these are."""
        found = wrong(gradient_numbers(gradients))
        # once more by itself, to look at each loss; in a group it may round differently
        rows = inspect(self.agent, self._moments, *update)
        self.agent.zero_grad()
        return (wrong(row for row in rows if "gradients" not in row.kind) | found) or {"losses": ["total_loss"]}

    @property
    def _moments(self) -> dict[str, Tensor]:
        states = self.optimizer.state_dict()["state"]
        return {f"{i}/{name}": tensor for i, state in states.items() for name, tensor in state.items()}

    def recall_divergence(self) -> None:
        """Say that an earlier attempt diverged; the file stays until this one gets past that update."""
        folder = self.config.folder
        if not (folder / FILE).exists():
            return
        try:
            before = read_diverged(folder).diverged
            self.stopped_at = before.update
            print(f"diverged   before: {before}")
        except DivergedError as error:
            self.stopped_at = 0
            print(f"refused    {error}")

    def diverge(self, at: int, stage: str, found: Wrong, update: FailedUpdate | None) -> Diverged:
        """Save the state, and take no further part in the run."""
        config = self.config
        self.diverged = Diverged(config.seed, at, stage, found, config.folder, self.result.evaluations)
        if processes.place().leads:
            save_diverged(config, self.diverged, state_tensors(self.agent, self.optimizer, self.generator), update)
        return self.diverged

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            RunError: it is of other data, or not of such a run.
        """
        try:
            check_notes(checkpoint.notes, checkpoint.step)
        except (TypeError, ValueError) as error:
            raise RunError(f"--resume: {checkpoint.path} has notes of no run ({error})") from error
        if checkpoint.notes["data"] != self.result.data_identity:
            raise RunError(
                f"--resume: {checkpoint.path} was trained on other data: {shown(checkpoint.notes['data'])}, "
                f"and now there is {self.result.data_identity}"
            )
        problem = None
        try:
            checkpoint.restore(self.agent, self.optimizer, self.generator)
            if self.explorer is not None and "online" in checkpoint.notes:
                problem = self.explorer.restore(checkpoint.part("replay"), checkpoint.notes["online"])
        except ValueError as error:
            raise RunError(f"--resume: {checkpoint.path} is not of this run: {error}") from error
        self.result.evaluations = checkpoint.notes["evaluations"]
        if problem is not None:
            print(f"online     {problem}")

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the policy and the summary; returns the latter."""
        save_policy(self.config, self.agent)
        return self.result.write(seconds)
