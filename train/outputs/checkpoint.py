"""Checkpoints: written whole or not at all, verified when read, and read without executing code.

A checkpoint is one safetensors file. It holds the agent, Adam's state, the random generator, the step and what was seen
online as tensors; its header holds the configuration and the evaluations so far as JSON, and a checksum of everything.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdkernels.policy.untrusted import check_safetensors, parse_json, require_alike
from train.agents.base import Agent
from train.outputs.files import create_folder, write_safetensors

KEPT = 3
"""Number of checkpoints kept on disk: more than one, because the newest could be damaged."""


class DamagedCheckpoint(RuntimeError):
    """The file is not as it was written."""


def save_checkpoint(
    folder: Path,
    step: int,
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    notes: dict[str, Any],
    replay: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``folder/step-<step>.safetensors`` and delete all but the newest ``KEPT``.

    A process that is killed at any moment leaves either the whole new file or none of it.
    """
    create_folder(folder, parents=False)  # a run's folder that was deleted must not come back without its other files
    tensors = state_tensors(agent, optimizer, generator)
    tensors |= {f"replay/{name}": tensor for name, tensor in (replay or {}).items()}
    path = folder / f"step-{step:09d}.safetensors"
    write_checkpoint(path, step, tensors, notes)
    for _, old in list(_newest_first(folder))[KEPT:]:
        old.unlink()
    return path


def state_tensors(agent: Agent, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Tensor]:
    """What an agent and its training are made of, as it is named in a checkpoint."""
    tensors = {f"agent/{name}": tensor for name, tensor in agent.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": tensor for name, tensor in state.items()}
    tensors["generator"] = generator.get_state()
    return tensors


def write_checkpoint(path: Path, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write a file that `read_checkpoint` reads."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"step": str(step), "notes": json.dumps(notes)}
    header["checksum"] = _checksum(tensors, header)
    write_safetensors(path, tensors, header)


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found intact."""

    path: Path
    step: int
    notes: dict[str, Any]
    tensors: dict[str, Tensor]

    def restore(self, agent: Agent, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Restore everything in place, because the tensors may be views of others.

        Raises:
            ValueError: the tensors are not those of such an agent, optimiser and generator. Nothing was restored.
        """
        (learning,) = (group["params"] for group in optimizer.param_groups)
        moments = {f"{i}/{name}": t for i, p in enumerate(learning) for name, t in optimizer.state[p].items()}
        require_alike(self.part("agent"), agent.state_dict())
        require_alike(self.part("adam"), moments)
        state = self.tensors.get("generator")
        require_alike({} if state is None else {"generator": state}, {"generator": generator.get_state()})
        try:
            generator.set_state(self.tensors["generator"])
        except RuntimeError as error:
            raise ValueError(f"its random generator cannot be restored: {error}") from error
        agent.load_state_dict(self.part("agent"))
        for name, tensor in self.part("adam").items():
            moments[name].copy_(tensor)

    def part(self, group: str) -> dict[str, Tensor]:
        """The tensors of a part: ``agent``, ``adam`` or ``replay``."""
        prefix = f"{group}/"
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file that `save_checkpoint` or `write_checkpoint` wrote.

    Raises:
        DamagedCheckpoint: the file is cut short or altered.
        OSError: it could not be read, which says nothing about it.
    """
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
        if header.pop("checksum", None) != _checksum(tensors, header):
            raise ValueError("its checksum does not match")
        step, notes = int(header["step"]), parse_json(header["notes"])
        if step < 0 or not isinstance(notes, dict):
            raise ValueError(f"it is of step {step}, with notes in a {type(notes).__name__}")
        return Checkpoint(path, step, notes, tensors)
    except OSError:
        raise
    except (MemoryError, RuntimeError) as error:  # Python or PyTorch has no memory for it
        raise OSError(f"{path} could not be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # safetensors, or a header that is no longer text
        raise DamagedCheckpoint(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error


def newest_checkpoints(folders: Sequence[Path]) -> tuple[list[Checkpoint], list[str]]:
    """One checkpoint from each folder, at the newest step that is intact in all; none if there is no such step.

    The second list says what is wrong with damaged checkpoints. If others take their place, they are renamed to
    ``*.damaged``, and later checkpoints are deleted, because training will reach those steps again.

    Raises:
        OSError: a checkpoint could not be read.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    paths = [dict(_newest_first(folder)) for folder in folders]
    for step in sorted(set.intersection(*map(set, paths)), reverse=True):
        found = []
        for path in (of_folder[step] for of_folder in paths):
            try:
                found.append(read_checkpoint(path))
            except DamagedCheckpoint as error:
                problems.append(str(error))
                damaged.append(path)
        if len(found) == len(folders):
            for path in damaged:
                path.rename(path.with_suffix(".damaged"))
            for of_folder in paths:
                for later in (path for at, path in of_folder.items() if at > step):
                    later.unlink(missing_ok=True)
            return found, problems
    return [], problems


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, intact or not; 0 if there is none."""
    return next(iter(steps_in(folder)), 0)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, intact or not, the newest first."""
    return [step for step, _ in _newest_first(folder)]


def _newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    found = [(int(m[1]), p) for p in folder.glob("*.safetensors") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
    yield from sorted(found, reverse=True)


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return str(crc)
