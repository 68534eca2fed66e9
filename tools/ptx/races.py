"""Which accesses to one place of memory nothing orders: the happens-before of the PTX memory model, in short.

Two accesses to the same two bytes by different threads, at least one of them a write, are a race unless

* both belong to one program (CTA) and a ``bar.sync`` of it lies between them;
* they belong to two programs, the first passed a ``bar.sync`` after its access and then added to a counter with
  ``release``; the second read the counter after that with ``acquire``, in GPU scope, and passed a ``bar.sync``;
* they store the same bits (compute-sanitizer lets that pass as well), or they do so in one instruction and what their
  warps' threads store there is the same choice of bits. A warp's threads may differ: CUDA says that one of them writes
  and leaves open which. They do where the compiler fuses a product into the sum over lanes that follows, so that equal
  sums are rounded differently on each lane;
* both are atomic;
* a ``bar.warp.sync`` lies between them and both are of one warp.

Nothing else orders: threads of one warp run in no particular order here, and ``ldmatrix``, ``stmatrix`` and ``shfl``
do not wait for one another's memory. What ``ldmatrix`` reads is read by the whole warp. ``cp.async`` reads its source
and writes its target at any time from its issue to the ``wait_group`` of the thread that issued it; from there on, the
data is that thread's write.

A place keeps a stamp of its last write, and one of its last reads for every program. Stamps of one program grow.

Unseen: what ``wgmma.fence`` orders; a write after a fence for the asynchronous proxy but before the next barrier; that
one of two asynchronous reads of a place, both under way, still goes on when the other has been waited for; and what
lies on ways through the code that a test does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GRANULE = 2  # bytes
# Where a stamp's fields begin: program, barriers passed, barriers of single warps since, thread, instruction.
CTA, EPOCH, WARP_EPOCH, AGENT = 52, 34, 28, 16
WARP, MANY, ASYNC, ATOMIC = 0x400, 0xFFF, 0xFFE, 0xFFD  # in the place of a thread; WARP + n is all of warp n
MANY_BITS = MANY << AGENT
MOST_WARP_BARRIERS = (1 << (EPOCH - WARP_EPOCH)) - 1  # those beyond order nothing
NEVER = ((1 << (CTA - WARP_EPOCH)) - 1) << WARP_EPOCH  # the epoch of what has not completed: ordered before nothing
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

    def warp_barrier(self) -> None:
        """Of every warp at once."""
        if (self.stamp >> WARP_EPOCH & MOST_WARP_BARRIERS) < MOST_WARP_BARRIERS:
            self.stamp += 1 << WARP_EPOCH


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
            agents, now = (stamps >> AGENT & MANY for stamps in (earlier, mine))
            theirs, ours = (stamps >> WARP_EPOCH & MOST_WARP_BARRIERS for stamps in (earlier, mine))
            in_order = (agents < WARP) & (agents == now) & (earlier >> EPOCH == mine >> EPOCH)
            in_order |= _one_warp(agents, now) & (theirs < ours) & (earlier >> EPOCH == mine >> EPOCH)
            wrong &= ~(in_order | same | ((agents == ATOMIC) & (now == ATOMIC)))
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
        mixed = (before >= order.limit) & ((before ^ mine) & MANY_BITS != 0)
        table[rows] = np.where(mixed, _together(before, mine), mine) if mixed.any() else mine
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
        late = (written >> EPOCH & ((1 << (CTA - EPOCH)) - 1)) > order.fenced
        if late.any():
            self.note("not fenced", written[late], index)


def _one_warp(agents: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether both are threads of one warp, or all of it."""
    first, second = (np.where(who < WARP, who >> 5, who - WARP) for who in (agents, others))
    return (first == second) & (first < 32)


def _together(stamps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The later of two stamps, in the name of both threads."""
    agents, now = (each >> AGENT & MANY for each in (stamps, others))
    warp = WARP + np.where(now < WARP, now >> 5, now - WARP)
    later = np.maximum(stamps & ~MANY_BITS, others & ~MANY_BITS)
    return later | np.where(_one_warp(agents, now), warp, MANY) << AGENT


def _share(table: np.ndarray, rows: np.ndarray, mine: np.ndarray, agents: np.ndarray | int) -> None:
    """Where several threads of one instruction left a stamp."""
    if np.ndim(agents):
        left = table[rows]
        lost = (left != mine).any(1)
        if lost.any():
            both, at = _together(left[lost], mine[lost]), rows[lost]
            table[at] = both
            many = (both & MANY_BITS == MANY_BITS).any(1)
            table[at[many]] |= MANY_BITS
