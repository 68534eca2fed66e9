"""Which accesses to one place of memory nothing orders: the happens-before of the PTX memory model, in short.

Two accesses to the same two bytes by different threads, at least one of them a write, are a race unless

* both belong to one program (CTA) and a ``bar.sync`` of it lies between them;
* they belong to two programs, the first passed a ``bar.sync`` after its access and then added to a counter with
  ``release``; the second read the counter after that with ``acquire``, in GPU scope, and passed a ``bar.sync``;
* they store the same bits (compute-sanitizer lets that pass as well), or they do so in one instruction and what their
  warps' threads store there is the same choice of bits. A warp's threads may differ: CUDA says that one of them writes
  and leaves open which. They do where the compiler fuses a product into the sum over lanes that follows, so that equal
  sums are rounded differently on each lane;
* both are atomic.

Nothing else orders: threads of one warp run in no particular order here, and ``ldmatrix``, ``stmatrix`` and ``shfl``
do not wait for one another's memory. What ``ldmatrix`` reads is read by the whole warp. ``cp.async`` reads its source
and writes its target at any time from its issue to the ``wait_group`` of the thread that issued it; from there on, the
data is that thread's write.

A place keeps a stamp of its last write, and one of its last reads for every program. Stamps of one program grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GRANULE = 2  # bytes
CTA, EPOCH, AGENT = 52, 28, 16  # where a stamp's fields begin: program, barriers passed, thread, instruction
MANY, ASYNC, ATOMIC = 0xFFF, 0xFFE, 0xFFD  # in the place of a thread
MANY_BITS, NOT_ONE = MANY << AGENT, ATOMIC << AGENT
NEVER = ((1 << (CTA - EPOCH)) - 1) << EPOCH  # the epoch of what has not completed: ordered before nothing
PLACE = (1 << AGENT) - 1


@dataclass(frozen=True)
class Race:
    kind: str  # "read after write", ...
    space: str
    first: int  # instructions
    second: int

    def __str__(self) -> str:
        return f"{self.kind} in {self.space} memory, instructions {self.first} and {self.second}"


class Order:
    """How much of every program's past one program has seen."""

    def __init__(self, cta: int, num_ctas: int) -> None:
        self.cta, self.epoch = cta, 0
        self.fenced = 0
        self.seen = np.zeros(num_ctas, np.int64)
        self.acquired = np.zeros(num_ctas, np.int64)
        self.barrier()

    def barrier(self) -> None:
        np.maximum(self.seen, self.acquired, out=self.seen)
        self.seen[self.cta] = self.epoch
        self.epoch += 1
        programs = np.arange(len(self.seen), dtype=np.int64)
        self.limits = (programs << CTA) + ((self.seen + 1) << EPOCH)
        """Of each program, the first stamp that is not ordered before what this one does now."""
        self.limit = int(self.limits[self.cta])
        self.stamp = (self.cta << CTA) + (self.epoch << EPOCH)


class Shadow:
    """The stamps of a piece of memory. ``rows`` are indices of aligned pieces of ``width`` bytes, one an agent."""

    def __init__(self, space: str, size: int, num_ctas: int, races: dict[Race, int]) -> None:
        granules = -(-size // 16) * 16 // GRANULE
        self.space, self.races = space, races
        self.written = np.zeros(granules, np.int64)
        self.reads = np.zeros((num_ctas, granules), np.int64)
        self.shared = num_ctas == 1

    def note(self, kind: str, earlier: np.ndarray, index: int) -> None:
        for first, count in zip(*np.unique(earlier & PLACE, return_counts=True)):
            race = Race(kind, self.space, int(first), index)
            self.races[race] = self.races.get(race, 0) + int(count)

    def stamps(self, order: Order, agents: np.ndarray | int, index: int, width: int) -> np.ndarray:
        """One a row."""
        base = (order.cta << CTA) + NEVER if np.ndim(agents) == 0 and agents == ASYNC else order.stamp
        stamps = np.asarray((agents << AGENT) + (base + index), np.int64).reshape(-1, 1)
        return np.repeat(stamps, width // GRANULE, 1)

    def check(self, kind: str, order: Order, earlier: np.ndarray, mine: np.ndarray, same: Any = np.False_) -> None:
        wrong = earlier >= (order.limit if self.shared else order.limits[earlier >> CTA])
        if wrong.any():
            agents = earlier & MANY_BITS
            wrong &= ((earlier ^ mine) > PLACE) | (agents >= NOT_ONE)
            if int(mine[0, 0]) >> AGENT & MANY == ATOMIC:
                wrong &= agents != NOT_ONE
            wrong &= ~same
            if wrong.any():
                self.note(kind, earlier[wrong], int(mine[0, 0]) & PLACE)

    def read(self, order: Order, rows: np.ndarray, width: int, agents: np.ndarray | int, index: int) -> None:
        shape = (-1, width // GRANULE)
        mine = self.stamps(order, agents, index, width)
        written = self.written.reshape(shape)[rows]
        if written.any():
            self.check("read after write", order, written, mine)
        table = self.reads[0 if self.shared else order.cta].reshape(shape)
        before = table[rows]
        mixed = (before >= order.limit) & ((before ^ mine) > PLACE)
        table[rows] = np.where(mixed, np.maximum(before, mine) | MANY_BITS, mine) if mixed.any() else mine
        _share(table, rows, mine, agents)

    def write(
        self, order: Order, rows: np.ndarray, width: int, agents: np.ndarray | int, index: int, same: Any = np.False_
    ) -> None:
        """``same``: where the bits are those that were there."""
        shape = (-1, width // GRANULE)
        mine = self.stamps(order, agents, index, width)
        table = self.written.reshape(shape)
        self.check("write after write", order, table[rows], mine, same)
        for reads in self.reads:
            self.check("write after read", order, reads.reshape(shape)[rows], mine)
        table[rows] = mine
        _share(table, rows, mine, agents)

    def completed(self, order: Order, rows: np.ndarray, width: int, agents: np.ndarray | None, index: int) -> None:
        """An asynchronous read, or write by ``agents``, has happened."""
        shape = (-1, width // GRANULE)
        if agents is None:
            self.reads[0 if self.shared else order.cta].reshape(shape)[rows] = order.stamp + MANY_BITS + index
        else:
            self.written.reshape(shape)[rows] = ((agents << AGENT) + (order.stamp + index)).reshape(-1, 1)

    def fenced(self, order: Order, rows: np.ndarray, width: int, index: int) -> None:
        """What was written in an earlier epoch has been fenced for the asynchronous proxy in that epoch or later."""
        written = self.written.reshape(-1, width // GRANULE)[rows]
        late = (written >> EPOCH & (NEVER >> EPOCH)) > order.fenced
        if late.any():
            self.note("not fenced", written[late], index)


def _share(table: np.ndarray, rows: np.ndarray, mine: np.ndarray, agents: np.ndarray | int) -> None:
    """Where several threads of one instruction left a stamp."""
    if np.ndim(agents):
        lost = (table[rows] != mine).any(1)
        if lost.any():
            table[rows[lost]] |= MANY_BITS
