"""Runs the programs (CTAs) of a launch in turns, each with all its threads at once in numpy."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tools.ptx.instructions import bind
from tools.ptx.program import WIDTHS, Instruction, Program, integer
from tools.ptx.races import Order, Race, Shadow

DTYPES: dict[str, Any] = {
    **{"pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32},
    **{"s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64},
    **{"f16": np.float16},
}
POISON = 0xFF  # NaN in every floating-point type
POLLS = 20_000  # most polls in a row without an addition, so that programs cannot wait for ever


class MemoryFault(Exception):
    """An access outside the program's memory, or a misaligned one."""


class Span:
    """A piece of memory: an argument, or the shared memory of a program."""

    def __init__(self, name: str, base: int, data: np.ndarray, num_ctas: int, races: dict[Race, int]) -> None:
        self.name, self.base, self.data, self.size = name, base, data, len(data)
        self.shadow = Shadow(name, self.size, num_ctas, races)
        self.tables: dict[tuple[int, int], np.ndarray] = {}

    def table(self, width: int, item: int) -> np.ndarray:
        """A view of the memory, (pieces, items per piece)."""
        if (width, item) not in self.tables:
            whole = self.data[: self.size // width * width]
            self.tables[width, item] = whole.view(f"u{item}").reshape(-1, width // item)
        return self.tables[width, item]

    def rows(self, addresses: np.ndarray, width: int, instruction: Instruction) -> np.ndarray:
        at = addresses.astype(np.int64) - self.base
        low, high = int(at.min()), int(at.max())
        if low < 0 or high + width > self.size:
            raise MemoryFault(f"outside of {self.name} ({low}, {high} of {self.size}): {instruction.text}")
        if (at & width - 1).any():
            raise MemoryFault(f"not aligned to {width} bytes: {instruction.text}")
        return at >> width.bit_length() - 1

    def load(
        self, order: Order, addresses: np.ndarray, width: int, item: int, agents: Any, instruction: Instruction
    ) -> np.ndarray:
        rows = self.rows(addresses, width, instruction)
        self.shadow.read(order, rows, width, agents, instruction.index)
        return self.table(width, item)[rows]

    def store(
        self, order: Order, addresses: np.ndarray, values: np.ndarray, agents: np.ndarray, instruction: Instruction
    ) -> None:
        width = values.shape[1] * values.itemsize
        rows = self.rows(addresses, width, instruction)
        table = self.table(width, values.itemsize)
        same = self.table(width, 2)[rows] == values.view(np.uint16)
        table[rows] = values
        self.shadow.write(order, rows, width, agents, instruction.index, same)
        beaten = (table[rows] != values).any(1)
        for row in np.unique(rows[beaten]):  # one of a warp's threads writes, any of them
            here = np.flatnonzero(rows == row)
            warps = {
                int(warp): {bytes(values[i]) for i in here if agents[i] // 32 == warp} for warp in agents[here] // 32
            }
            if len({frozenset(stored) for stored in warps.values()}) > 1:
                self.shadow.note("two values", np.array([instruction.index]), instruction.index)


class Global:
    """The memory of the arguments, at its addresses in this process."""

    def __init__(self, tensors: Sequence[torch.Tensor], constants: dict[str, np.ndarray], num_ctas: int) -> None:
        self.races: dict[Race, int] = {}
        pieces: dict[int, np.ndarray] = {}
        self.symbols = {}
        self.num_ctas = num_ctas
        for tensor in tensors:
            size, base = tensor.numel() * tensor.element_size(), tensor.data_ptr()
            if size > len(pieces.get(base, ())):
                assert tensor.is_contiguous()
                assert base % 16 == 0, "the allocator aligns what a kernel is given"
                pieces[base] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        for name, constant in constants.items():
            self.symbols[name] = constant.ctypes.data
            pieces[constant.ctypes.data] = constant
        self.spans = [Span("global", base, data, num_ctas, self.races) for base, data in sorted(pieces.items())]
        self.bases = np.array([span.base for span in self.spans], np.int64)
        self.released: dict[int, np.ndarray] = {}
        self.polls = 0

    def find(self, addresses: np.ndarray, instruction: Instruction) -> Span:
        """The span of the first address, in which the others must lie too."""
        at = int(np.searchsorted(self.bases, int(addresses[0]), "right")) - 1
        if at < 0:
            raise MemoryFault(f"in no argument: {instruction.text}")
        return self.spans[at]


@functools.cache
def _number(text: str, kind: str) -> np.ndarray:
    if text == "global_smem" or text.startswith("__local_depot"):
        return DTYPES[kind](0)
    if text[:2] in ("0f", "0d"):
        bits = np.uint32(int(text[2:], 16)) if text[1] == "f" else np.uint64(int(text[2:], 16))
        return bits.view(DTYPES[kind])
    if kind == "pred":
        return np.asarray(integer(text) != 0)
    size = np.dtype(DTYPES[kind]).itemsize
    return np.array(integer(text) % (1 << 8 * size), f"u{size}").view(DTYPES[kind])[()]


class Cta:
    """One program: its registers as (number, threads) arrays, its shared memory, and the positions of its threads."""

    def __init__(
        self,
        program: Program,
        memory: Global,
        arguments: dict[str, Any],
        grid: tuple[int, int],
        index: int,
        shared_bytes: int,
    ) -> None:
        self.program, self.memory, self.arguments = program, memory, arguments
        places = {"%ctaid.x": index % grid[0], "%ctaid.y": index // grid[0], "%nctaid.x": grid[0], "%nctaid.y": grid[1]}
        self.places = {name: np.uint32(place) for name, place in places.items()}
        self.num_threads = threads = program.threads
        self.thread = np.arange(threads)
        self.order = Order(index, memory.num_ctas)
        self.registers = {}
        for prefix, (kind, count) in program.registers.items():
            poison = np.full((count or 1, threads * WIDTHS[kind]), kind == "pred" or POISON, np.uint8)
            self.registers[prefix] = poison.view(DTYPES[kind])
        self.views: dict[tuple[str, str], np.ndarray] = {}
        self.carry = np.zeros(threads, np.uint64)
        self.local = np.full((program.local_bytes // 4, threads), 0xFFFFFFFF, np.uint32)
        shared = np.full(shared_bytes + 16, POISON, np.uint8)
        self.shared = Span("shared", 0, shared[-shared.ctypes.data % 16 :][:shared_bytes], 1, memory.races)
        self.copies: list[list[Any]] = []  # committed groups of asynchronous copies
        self.uncommitted: list[Any] = []
        self.products: list[tuple[list, list]] = []  # (reads, results) of committed asynchronous products
        self.reading: list[tuple[np.ndarray, int]] = []
        self.multiplied: list[tuple[str, ...]] = []
        self.in_flight: dict[tuple[str, ...], np.ndarray] = {}
        self.polled = False
        self.blocks = [[bind(self, instruction) for instruction in block] for block in program.blocks]

    def register(self, name: str, kind: str) -> np.ndarray:
        """All threads' values of a register, viewed as numbers of a type, to read and write."""
        if (name, kind) not in self.views:
            prefix = name.rstrip("0123456789")
            array = self.registers[prefix][int(name[len(prefix) :] or 0)]
            self.views[name, kind] = array if kind == "pred" else array.view(DTYPES[kind])
        return self.views[name, kind]

    def value(self, text: str, kind: str) -> np.ndarray:
        """The values of a register, or one number for all threads."""
        if text == "%tid.x":
            return self.thread.astype(np.uint32)
        if text in self.places:
            return self.places[text]
        if text[0] == "%":
            return self.register(text, kind)
        if text in self.memory.symbols:
            return np.uint64(self.memory.symbols[text])
        return _number(text, kind)

    def run(self) -> Iterator[None]:
        """Run groups of threads, each at one block. The first in the text runs until it joins the next."""
        at: dict[int, Any] = {0: True}
        waiting: dict[int, Any] = {}
        while at or waiting:
            if not at:  # all remaining threads have reached a barrier
                at, waiting = waiting, {}
                self.order.barrier()
                yield
            index = min(at)
            mask = at.pop(index)
            for operation in self.blocks[index]:
                branch = operation(mask)
            kind, taken, target = branch if isinstance(branch, tuple) else ("next", False, 0)
            if kind == "exit":
                continue
            if isinstance(taken, bool):
                goes = {target if taken else index + 1: mask}
            else:
                goes = {target: mask & taken, index + 1: mask & ~taken}
            queue = waiting if kind == "barrier" else at
            for block, threads in goes.items():
                if np.any(threads):
                    together = queue.get(block, False) | threads
                    queue[block] = True if np.all(together) else together
            if self.polled:
                self.polled = False
                yield


def launch(
    program: Program, grid: tuple[int, ...], arguments: Sequence[Any], shared_bytes: int, seed: int = 0
) -> dict[Race, int]:
    """Run a launch, which writes to its tensors. Returns the first races found and the number of places of each."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    columns, lines = (*grid, 1)[:2]
    num_ctas = columns * lines
    memory = Global(tensors, program.constants, num_ctas)
    given = {name: argument for (name, _), argument in zip(program.parameters, arguments)}
    chance = random.Random(seed)
    with np.errstate(all="ignore"):
        every = (Cta(program, memory, given, (columns, lines), index, shared_bytes) for index in range(num_ctas))
        ctas = [cta.run() for cta in every]
        while ctas and not memory.races:
            if memory.polls > POLLS:
                raise TimeoutError("programs wait for one another for ever")
            turn = chance.choice(ctas)
            if next(turn, "end") == "end":
                ctas.remove(turn)
    return memory.races
