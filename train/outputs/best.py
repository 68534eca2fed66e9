"""The policy with the best evaluation so far: checkpoints/best-<step>.safetensors, in the form of policy.safetensors.

A run that goes on from an earlier checkpoint needs the policy that was the best one then, so some older ones stay.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from fdkernels.policy import PolicyError
from train.agents.base import Agent
from train.outputs.checkpoint import steps_in
from train.outputs.files import create_folder
from train.outputs.policy import save_policy
from train.settings import RunConfig


def save_best(config: RunConfig, agent: Agent, step: int) -> None:
    """Write the policy of the evaluation at this step, which is better than all before."""
    folder = config.checkpoints
    create_folder(folder, parents=False)
    save_policy(config, agent, folder / f"best-{step:09d}.safetensors")
    prune_best(folder)


def prune_best(folder: Path) -> None:
    """Delete the policies that no run needs that goes on from one of the checkpoints in the folder.

    Evaluations at the step of a checkpoint may have been made before it or after it, so each needs up to two.
    """
    found = best_files(folder)
    needed = {max(found, default=0)}
    for at in steps_in(folder):
        needed |= {max((step for step in found if step < at), default=at), at}
    _delete(path for step, path in found.items() if step not in needed)


def keep_best(folder: Path, evaluated: Collection[int]) -> None:
    """Delete the policies of other evaluations than these, which a run that goes on will make again."""
    _delete(path for step, path in best_files(folder).items() if step not in evaluated)


def best_files(folder: Path) -> dict[int, Path]:
    """The files in a folder of checkpoints by their steps. The last one is the best."""
    found = {int(m[1]): p for p in folder.glob("*.safetensors") if (m := re.fullmatch(r"best-(\d+)", p.stem))}
    return dict(sorted(found.items()))


def best_file(run: Path) -> Path:
    """The file of a run's best policy.

    Raises:
        PolicyError: the run has none.
    """
    found = best_files(run / "checkpoints")
    if not found:
        raise PolicyError(f"{run / 'checkpoints'} has no best-*.safetensors: a run writes it when it evaluates")
    return found[max(found)]


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
