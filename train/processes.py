"""One run in several processes, as torchrun starts them: each computes its part of every batch.

All processes draw the same random numbers for the whole batch, and each takes its own rows of it. Gradients and the
means that a loss depends on are summed over the processes, so that the parameters are those of one process but for
rounding, with any number of processes. Every process then steps its own copy of the optimiser by the same gradients.
Online, each plays the same episodes in its own simulator.

DistributedDataParallel is not used. It wraps one forward pass whose parameters all get gradients, while here the losses
change from stage to stage, several agents share one backward pass (``train/agents/seeds.py``), and normalised Q losses
need a mean over the whole batch. The networks are small, so that one sum of all gradients together costs little.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Columns = TypeVar("Columns", bound=tuple[Any, ...])
"""A named tuple of tensors, some of which may be None."""
LONGEST_WAIT = datetime.timedelta(hours=2)
"""How long processes wait for one that still runs, such as the leader while it evaluates."""


class LostContact(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class Place(NamedTuple):
    """Where this process stands among those of its run."""

    rank: int = 0
    total: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Its number on this machine."""

    @property
    def leads(self) -> bool:
        """Whether it evaluates, prints, and writes all files."""
        return self.rank == 0


_place = Place()


def place() -> Place:
    return _place


def as_started() -> Place:
    """The place that torchrun's environment variables give this process."""
    if not dist.is_torchelastic_launched():
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextlib.contextmanager
def joined(on_gpus: bool) -> Iterator[Place]:
    """Inside, the processes that torchrun started work together; without torchrun there is just this one.

    Raises:
        LostContact: the others cannot be reached.
    """
    global _place
    if (started := as_started()).total == 1:
        yield _place
        return
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    # Its functions have the default group as a default argument. If the compiler first imported it after the next line,
    # the group and its threads would outlive `destroy_process_group`, and could meet the end of Python in a destructor,
    # which aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    with _contact():
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    _place = started
    try:
        yield started
        dist.destroy_process_group()  # not after an error, when it could wait for processes that are gone
    finally:
        _place = Place()


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # also dist.DistError, its subclass
        raise LostContact(
            f"process {as_started().rank} has lost contact with the others: one of them has ended, and says why if it "
            f"could. --resume goes on from the last checkpoint. ({str(error).splitlines()[0]})"
        ) from error


# -- what an update needs ----------------------------------------------------------------------------------------------


def own_rows(batch_size: int) -> slice:
    """This process's rows of a batch; the parts differ by one row at most."""
    rank, total, _ = _place
    return slice(batch_size * rank // total, batch_size * (rank + 1) // total)


def batch_mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over the whole batch, from this process's rows of it; not differentiable."""
    if _place.total == 1:
        return x.mean()
    total, size = _sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))
    return total / size


def batch_means(means: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Means over the whole batch, from those over this process's rows."""
    if _place.total == 1:
        return list(means)
    weighted = [mean.detach().double() * rows for mean in means]
    *totals, size = _sum(torch.stack([*weighted, weighted[0].new_tensor(rows)]))
    return [total / size for total in totals]


def average(tensors: Sequence[Tensor], rows: int) -> None:
    """Replace sums over this process's rows by means over the whole batch; losses, and gradients of them."""
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_tensor([rows])])
    with _contact():
        dist.all_reduce(flat)
    *parts, size = flat.split([*(tensor.numel() for tensor in tensors), 1])
    torch._foreach_div_(parts, size.squeeze())
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


@torch.library.custom_op("fdkernels_train::sum_over_processes", mutates_args=())
def _sum(x: Tensor) -> Tensor:
    result = x.clone()
    with _contact():
        dist.all_reduce(result)
    return result


@_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_sum.register_vmap
def _(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    return _sum(x), in_dims[0]


# -- what the loop needs -----------------------------------------------------------------------------------------------


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if _place.total == 1:
        return flag
    flags = torch.tensor(flag, dtype=torch.uint8)
    with _contact():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def agree(content: bytes) -> bool:
    """Whether all processes called this with the same bytes."""
    if _place.total == 1:
        return True
    crc = zlib.crc32(content)
    extremes = torch.tensor([crc, -crc])
    with _contact():
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes[0] == -extremes[1])


def from_leader(value: T) -> T:
    """The leader's value; what the others pass is ignored."""
    if _place.total == 1:
        return value
    box = [value]
    with _contact():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def wait_for_leader() -> None:
    """Return when the leader has called this too."""
    from_leader(None)


def whole_batch(columns: Columns) -> Columns:
    """The columns of the whole batch, from this process's rows of them."""
    if _place.total == 1:
        return columns
    parts: list[Any] = [None] * _place.total
    with _contact():
        dist.all_gather_object(parts, [None if column is None else column.cpu() for column in columns])
    whole = (None if own is None else torch.cat(column).to(own.device) for own, column in zip(columns, zip(*parts)))
    return type(columns)(*whole)  # type: ignore[arg-type]
