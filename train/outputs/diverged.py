"""diverged.safetensors: the state in which the numbers of a run went wrong, and the update that shows it.

It is a checkpoint: agent, Adam's state and generator as they were before the update that was not made, the generator
after it drew that update's numbers. With it are that batch and these numbers, so that the update can be made again
without the data, the environment or the generator. Where there was no such update (an evaluation, or updates as CUDA
graphs, which cannot stop) the state is that in which the fault was noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkernels.policy.file import sizes_in
from fdkernels.policy.untrusted import require_alike
from train.agents import AGENTS
from train.agents.base import ALL_PARTS, Agent, Draws, Part, Parts
from train.data.transitions import Batch
from train.health import Wrong, describe, given
from train.outputs.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from train.outputs.record import read_table
from train.reading import record_from_json, shown
from train.settings import RunConfig, RunError

FILE = "diverged.safetensors"
KNOWN_PARTS: tuple[Part, ...] = (*ALL_PARTS, "data_critic", "frozen_flow")


class DivergedError(RuntimeError):
    """The saved state is missing, or is not one."""


class Diverged(NamedTuple):
    """A seed whose numbers went wrong."""

    seed: int
    update: int
    """The number of the update that was not made, or of the last one before the fault was noticed."""
    stage: str
    found: Wrong
    folder: Path
    evaluations: Sequence[dict[str, Any]]
    """Its evaluations until then."""

    def __str__(self) -> str:
        return (
            f"seed {self.seed} diverged at update {self.update:,} ({self.stage}): not finite are {describe(self.found)}"
        )

    def report(self, *, in_a_graph: bool, group: bool) -> str:
        """What to print when it happens.

        Args:
            in_a_graph: whether the update was part of a CUDA graph, and was made all the same.
            group: whether the seed is one of several.
        """
        lines = [str(self), f"its state: {self.folder / FILE}, shown by python train/diverged.py {self.folder}"]
        if in_a_graph:
            alone = f" --num-seeds 1 --seed {self.seed} --out {self.folder}" if group else ""
            lines.append(
                f"CUDA graphs do not stop at an update. --resume --capture off{alone} begins again at the last "
                "checkpoint, and saves the state before this update"
            )
        return "\n".join(lines)


class FailedUpdate(NamedTuple):
    """What an update is made from, besides agent and optimiser."""

    batch: Batch
    draws: Draws
    parts: Parts


def save_diverged(config: RunConfig, diverged: Diverged, state: dict[str, Tensor], update: FailedUpdate | None) -> None:
    """Write the file into the run's folder; ``state`` is that of `state_tensors`."""
    tensors, notes = dict(state), {"seed": diverged.seed, "stage": diverged.stage, "found": diverged.found}
    notes |= {"env": config.env, "agent": config.agent, "hyper": config.as_json()["hyper"], "parts": []}
    if update is not None:
        tensors |= {f"batch/{name}": column for name, column in given(update.batch).items()}
        tensors |= {f"noise/{name}": drawn for name, drawn in given(update.draws).items()}
        notes["parts"] = list(update.parts)
    write_checkpoint(diverged.folder / FILE, diverged.update, tensors, notes)


class Saved(NamedTuple):
    """The contents of the file."""

    diverged: Diverged
    agent: Agent
    moments: dict[str, Tensor]
    update: FailedUpdate | None


def read_diverged(folder: Path) -> Saved:
    """Read what `save_diverged` wrote; nothing in it is executed, and nothing is larger than the file says.

    Raises:
        DivergedError: the file is missing, damaged, or of another version.
    """
    path = folder / FILE
    if not path.exists():
        raise DivergedError(f"{path} is not there: no number of this run went wrong")
    try:
        checkpoint = read_checkpoint(path)
        notes = checkpoint.notes
        found = {shown(kind): [shown(name) for name in names] for kind, names in notes["found"].items()}
        diverged = Diverged(
            int(notes["seed"]), checkpoint.step, shown(notes["stage"]), found, folder, _evaluations(folder)
        )
        weights, moments = checkpoint.part("agent"), checkpoint.part("adam")
        agent = agent_without_memory(notes["agent"], notes["hyper"], weights)
        wanted = {"agent": agent.state_dict(), "adam": _of_adam(agent)}
        update = None
        if notes["parts"]:
            update = FailedUpdate(
                Batch(**checkpoint.part("batch")), Draws(**checkpoint.part("noise")), _known(notes["parts"])
            )
            wanted |= _of_update(agent, update)
        require_alike(
            {name: tensor for name, tensor in checkpoint.tensors.items() if name != "generator"},
            {f"{part}/{name}": tensor for part, tensors in wanted.items() for name, tensor in tensors.items()},
        )
        agent.load_state_dict(weights, assign=True)
        return Saved(diverged, agent, moments, update)
    except DamagedCheckpoint as error:
        raise DivergedError(str(error)) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DivergedError(f"{path} is no state of this version ({type(error).__name__}: {error})") from error


def without_diverged(config: RunConfig) -> tuple[list[RunConfig], list[Diverged]]:
    """The settings of each seed that is to be trained, and the seeds that diverged before a group was resumed.

    Those lack the checkpoint that the others go on from. Alone, a seed that diverged may go on.

    Raises:
        RunError: all have diverged, or the state of one cannot be read.
    """
    configs = config.of_each_seed()
    if not config.resume or config.num_seeds == 1:
        return configs, []
    folders = [single.folder for single in configs if (single.folder / FILE).exists()]
    if len(folders) == len(configs):
        raise RunError(f"--resume: all seeds of this group diverged, see {FILE} in {', '.join(map(str, folders))}")
    try:
        diverged = [read_diverged(folder).diverged for folder in folders]
    except DivergedError as error:
        raise RunError(f"--resume: {error}") from error
    return [single for single in configs if single.folder not in folders], diverged


def agent_without_memory(name: str, hyper: Any, weights: Mapping[str, Tensor]) -> Agent:
    """The agent that a file claims to have the weights of, on the meta device.

    The file decides how large the agent is, and may lie: compare its tensors (`require_alike`) before assigning them.

    Args:
        name: the agent's, as for ``--agent``.
        hyper: its hyper-parameters, from JSON.
        weights: the tensors in the file; no more layers are made than there are of them.

    Raises:
        KeyError, IndexError, TypeError, ValueError, RuntimeError: they do not fit each other.
    """
    kind = AGENTS[name]
    config = record_from_json(kind.hyperparameters, hyper)
    sizes = sizes_in(weights, config)
    with torch.device("meta"):
        return kind(config, *sizes)


def _of_adam(agent: Agent) -> dict[str, Tensor]:
    """Tensors of the shapes of Adam's state."""
    learning = [p for p in agent.parameters() if p.requires_grad]
    shapes = {f"{i}/{name}": p for i, p in enumerate(learning) for name in ("exp_avg", "exp_avg_sq")}
    return shapes | {f"{i}/step": p.new_zeros(()) for i, p in enumerate(learning)}


def _of_update(agent: Agent, update: FailedUpdate) -> dict[str, dict[str, Tensor]]:
    """Tensors of the shapes of the batch, and of the noise that the agent draws for as many rows."""
    rows = len(update.batch.rewards)
    states = agent.obs_mean.expand(rows, *agent.obs_mean.shape)
    actions, numbers = agent.obs_mean.new_zeros(rows, agent.action_dim), agent.obs_mean.new_zeros(rows)
    fitting = given(Batch(states, actions, numbers, states, numbers, actions))
    with torch.device("meta"):
        drawn = given(agent.draw(rows))
    return {"batch": {name: fitting[name] for name in given(update.batch)}, "noise": drawn}


def _known(parts: Sequence[str]) -> Parts:
    known = {str(part): part for part in KNOWN_PARTS}
    return tuple(known[part] for part in parts)


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / "evaluations.csv"
    if not path.exists():
        return []
    return [{**row, "step": int(row["step"]), "score_mean": float(row["score_mean"])} for row in read_table(path)]
