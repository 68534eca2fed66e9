"""Find unordered accesses to the same memory, by a simplified happens-before of the PTX memory model.

Two accesses to the same two bytes by different threads, at least one of them a write, are a race unless

* both belong to one program (CTA), with one of its ``bar.sync`` between them;
* they belong to two programs: the first passed a ``bar.sync`` after its access and then added to a counter with
  ``release``; the second then read the counter with ``acquire``, in GPU scope, and passed a ``bar.sync`` before its
  access;
* they store the same bits (compute-sanitizer allows that too), or they do it in one instruction and each of their warps
  stores the same set of bits there. The threads of one warp may store different bits, because CUDA says that one of
  them writes and leaves open which. This happens where the compiler fuses a product into the following sum over lanes,
  so that each lane rounds the same sum differently;
* both are atomic;
* both belong to one warp, with a ``bar.warp.sync`` between them.

Nothing else orders accesses: threads of one warp run in no particular order here, and ``ldmatrix``, ``stmatrix`` and
``shfl`` do not order memory. ``ldmatrix`` reads for the whole warp. ``cp.async`` reads its source and writes its target
at any time between its issue and the ``wait_group`` of the issuing thread; after that, the data count as written by
that thread.

A place keeps a stamp of its last write, and for every program one of its last reads. A program's stamps increase.

Races that it cannot see: those that ``wgmma.fence`` should prevent; a write after a fence for the asynchronous proxy
but before the next barrier; a write during one of two asynchronous reads of a place, after a wait for the other; and
races on paths through the code that no test takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GRANULE = 2  # bytes
# Where a stamp's fields begin: program, barriers passed, barriers of single warps since, thread, instruction.
CTA, EPOCH, WARP_EPOCH, AGENT = 52, 34, 28, 16
WARP, MANY, ASYNC, ATOMIC = 0x400, 0xFFF, 0xFFE, 0xFFD  # used instead of a thread; WARP + n means all of warp n
MANY_BITS = MANY << AGENT
MOST_WARP_BARRIERS = (1 << (EPOCH - WARP_EPOCH)) - 1  # any more of them order nothing
NEVER = ((1 << (CTA - WARP_EPOCH)) - 1) << WARP_EPOCH  # the epoch of accesses not yet completed: ordered before nothing
PLACE = (1 << AGENT) - 1


@dataclass(frozen=True)
class Race:
    kind: str  # "read after write", ...
    space: str
    first: int  # indices of the two instructions
    second: int

    def __str__(self) -> str:
        return f"{self.kind} in {self.space} memory, instructions {self.first} and {self.second}"


class Order:
    """How much of each program's past this program has seen."""

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
        """For each program, the first stamp that is not ordered before this program's next accesses."""
        self.limit = int(self.limits[self.cta])
        self.stamp = (self.cta << CTA) + (self.epoch << EPOCH)

    def warp_barrier(self) -> None:
        """A ``bar.warp.sync`` of all warps."""
        if (self.stamp >> WARP_EPOCH & MOST_WARP_BARRIERS) < MOST_WARP_BARRIERS:
            self.stamp += 1 << WARP_EPOCH


class Shadow:
    """The stamps of a span of memory. ``rows`` are indices of aligned pieces of ``width`` bytes, one per agent."""

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
        """A stamp for each row, repeated over the row's granules."""
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
        """Record a write. ``same`` marks where it leaves the bits unchanged."""
        shape = (-1, width // GRANULE)
        mine = self.stamps(order, agents, index, width)
        table = self.written.reshape(shape)
        self.check("write after write", order, table[rows], mine, same)
        for reads in self.reads:
            self.check("write after read", order, reads.reshape(shape)[rows], mine)
        table[rows] = mine
        _share(table, rows, mine, agents)

    def completed(self, order: Order, rows: np.ndarray, width: int, agents: np.ndarray | None, index: int) -> None:
        """Record that an asynchronous write by ``agents`` has completed, or a read if ``agents`` is None."""
        shape = (-1, width // GRANULE)
        if agents is None:
            self.reads[0 if self.shared else order.cta].reshape(shape)[rows] = order.stamp + MANY_BITS + index
        else:
            self.written.reshape(shape)[rows] = ((agents << AGENT) + (order.stamp + index)).reshape(-1, 1)

    def fenced(self, order: Order, rows: np.ndarray, width: int, index: int) -> None:
        """Check that each write was followed, in its epoch or later, by a fence for the asynchronous proxy."""
        written = self.written.reshape(-1, width // GRANULE)[rows]
        late = (written >> EPOCH & ((1 << (CTA - EPOCH)) - 1)) > order.fenced
        if late.any():
            self.note("not fenced", written[late], index)


def _one_warp(agents: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether both are threads of the same warp, or that whole warp."""
    first, second = (np.where(who < WARP, who >> 5, who - WARP) for who in (agents, others))
    return (first == second) & (first < 32)


def _together(stamps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The later of two stamps, attributed to both threads."""
    agents, now = (each >> AGENT & MANY for each in (stamps, others))
    warp = WARP + np.where(now < WARP, now >> 5, now - WARP)
    later = np.maximum(stamps & ~MANY_BITS, others & ~MANY_BITS)
    return later | np.where(_one_warp(agents, now), warp, MANY) << AGENT


def _share(table: np.ndarray, rows: np.ndarray, mine: np.ndarray, agents: np.ndarray | int) -> None:
    """Merge the stamps where several threads of one instruction accessed the same place."""
    if np.ndim(agents):
        left = table[rows]
        lost = (left != mine).any(1)
        if lost.any():
            both, at = _together(left[lost], mine[lost]), rows[lost]
            table[at] = both
            many = (both & MANY_BITS == MANY_BITS).any(1)
            table[at[many]] |= MANY_BITS
