"""Checkpoints that survive: written whole or not at all, checked when read, no code executed.

A checkpoint is one safetensors file: the agent, Adam's state, the random generator and the step as tensors, the
configuration and what has been measured so far as JSON in its header, with a checksum over the tensors.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.agents import Agent

KEPT = 2
"""Checkpoints that stay on disk: one could be damaged."""


class DamagedCheckpoint(RuntimeError):
    """The file is not what was written."""


def save_checkpoint(
    folder: Path,
    step: int,
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    notes: dict[str, Any],
) -> Path:
    """Write ``folder/step-<step>.safetensors`` and drop all but the newest ``KEPT``.

    A process killed at any moment leaves either the whole new file or none of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"agent/{name}": tensor for name, tensor in agent.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": tensor for name, tensor in state.items()}
    tensors["generator"] = generator.get_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"step": str(step), "checksum": str(_checksum(tensors)), "notes": json.dumps(notes)}
    path = folder / f"step-{step:09d}.safetensors"
    write_safetensors(path, tensors, header)
    for _, old in list(_newest_first(folder))[KEPT:]:
        old.unlink()
    return path


def load_checkpoint(
    path: Path, agent: Agent, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> tuple[int, dict[str, Any]]:
    """Bring everything back to where it was; returns the step and the notes.

    Raises:
        DamagedCheckpoint: the file is cut short or altered. Nothing has been changed then.
    """
    tensors, header = _read(path)
    agent.load_state_dict({name.removeprefix("agent/"): t for name, t in tensors.items() if name.startswith("agent/")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam/"):
            _, index, field = name.split("/")
            state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    generator.set_state(tensors["generator"])
    return int(header["step"]), json.loads(header["notes"])


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one."""
    problems = []
    for _, path in _newest_first(folder):
        try:
            _read(path)
        except DamagedCheckpoint as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def checkpoint_notes(path: Path) -> dict[str, Any]:
    """The notes of a whole checkpoint, without its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["notes"])


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a file that appears under its name only once it is safely on disk."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=header)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    found = [(int(m[1]), p) for p in folder.glob("*.safetensors") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
    yield from sorted(found, reverse=True)


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return crc


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except Exception as error:  # safetensors, the operating system, or a header that is no longer text
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error
    if header.get("checksum") != str(_checksum(tensors)):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its checksum does not match")
    return tensors, header
