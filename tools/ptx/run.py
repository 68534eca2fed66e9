"""Run launchers on CPU tensors: their kernels are compiled for a GPU and run on the emulator."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from fdkernels.kernels.flow import launch as flow_launch
from tools.aot import AheadOfTime, Compiler
from tools.ptx.machine import launch
from tools.ptx.program import parse
from tools.ptx.races import Race


class RaceError(AssertionError):
    def __init__(self, races: dict[Race, int], ptx: str) -> None:
        lines = {i.index: i.text for block in parse(ptx).blocks for i in block}
        found = [f"{race} ({count}): {lines[race.first]} / {lines[race.second]}" for race, count in races.items()]
        super().__init__("\n".join(found))
        self.races = races


class Emulated(AheadOfTime):
    """Stands in for a kernel: ``kernel[grid](...)`` compiles it and runs its PTX on the given tensors."""

    edit: Callable[[str], str] = staticmethod(lambda ptx: ptx)
    seed = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Emulated:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **given: Any) -> None:
        build = self.compile(args, given)
        ptx = self.edit(build.compiled.asm["ptx"])
        program = parse(ptx)
        assert program.threads == 32 * build.num_warps
        arguments = [*build.arguments, 0, 0]  # scratch pointers, which no kernel here uses
        assert len(program.parameters) == len(arguments)
        races = launch(program, self.grid, arguments, build.compiled.metadata.shared, self.seed)
        if races:
            raise RaceError(races, ptx)


def emulate(
    architecture: str,
    launcher: Callable,
    *args: Any,
    edit: Callable[[str], str] | None = None,
    seed: int = 0,
    processors: int | None = None,
) -> Any:
    """Run a launcher and return its result. Fresh memory is NaN.

    Args:
        edit: changes the compiled PTX before it runs.
        seed: seeds the order in which programs take turns.
        processors: number of the GPU's processors, to give it fewer.
    """

    class Stand(Emulated):
        pass

    Stand.seed = seed
    if edit is not None:
        Stand.edit = staticmethod(edit)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with Compiler(architecture, Stand), contextlib.ExitStack() as patches:
            if processors is not None:
                few = mock.patch.object(flow_launch, "multiprocessors", return_value=processors)
                patches.enter_context(few)
            return launcher(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def without(ptx: str, pattern: str, which: int) -> str:
    """The text without the given one of the matching lines."""
    lines = ptx.splitlines()
    at = [i for i, line in enumerate(lines) if re.search(pattern, line)][which]
    return "\n".join(lines[:at] + lines[at + 1 :])
