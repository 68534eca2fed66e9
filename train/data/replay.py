"""What an agent learns from while it is online: the offline data, and all that it has seen since."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from train.data.transitions import Batch, OfflineDataset

Mixture = Literal["all", "balanced"]
TABLES = ("states", "rows", "actions", "rewards", "masks", "next_rows", "next_steps")


class Replay:
    """An offline dataset, and after it the transitions of online episodes, in the order in which they are added.

    The offline data stay where they are. The online tables have room for ``capacity`` transitions from the start, so
    that adding one never copies the others.

    Args:
        offline: the offline data; the online tables are on the same device.
        capacity: the most transitions that will be added.
        mixture: all draws from offline and online transitions alike (FQL, arXiv 2502.02538); balanced draws half of
            each batch, rounded down, from the online ones once there are any (RLPD, arXiv 2302.02948).
        n_step, discount: online transitions span up to ``n_step`` steps, as those of `OfflineDataset.n_step` do. The
            offline data are taken as they are.
    """

    def __init__(
        self, offline: OfflineDataset, capacity: int, mixture: Mixture = "all", n_step: int = 1, discount: float = 1.0
    ) -> None:
        def room(rows: int, like: Tensor) -> Tensor:
            return like.new_zeros(rows, *like.shape[1:])

        self.offline, self.mixture, self.n_step = offline, mixture, min(n_step, capacity)
        self.online = OfflineDataset(
            states=room(2 * capacity, offline.states),  # episodes may be one transition long, which has two states
            rows=room(capacity, offline.rows),
            actions=room(capacity, offline.actions),
            rewards=room(capacity, offline.rewards),
            masks=room(capacity, offline.masks),
            next_rows=room(capacity, offline.next_rows),
            next_steps=room(capacity, offline.next_steps),
            episode_lengths=np.zeros(0, np.int64),
        )
        self.added = 0
        """Number of online transitions."""
        self._states = 0
        self._first = 0  # the first transition of the episode under way
        device = offline.rows.device
        self._powers = torch.tensor([discount**i for i in reversed(range(self.n_step))], device=device)
        # Once more on the device: a CUDA graph of `draw` reads it there, and would never see Python's number change.
        self._size = torch.zeros((), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.offline) + self.added

    # -- adding --------------------------------------------------------------------------------------------------

    def begin(self, state: Tensor) -> None:
        """Begin an episode in this state, (obs_dim,)."""
        self.online.states[self._states] = state
        self._states += 1
        self._first = self.added

    def add(self, action: Tensor, reward: Tensor, mask: float, state: Tensor) -> None:
        """Add the transition from the newest state, which led to ``state``; an episode ends where the mask is 0."""
        i, row, tables = self.added, self._states, self.online
        tables.states[row] = state
        tables.rows[i], tables.actions[i], tables.rewards[i] = row - 1, action, 0.0
        # this reward also belongs to transitions that began at most n − 1 steps ago, and they now lead here
        steps = slice(max(i + 1 - self.n_step, self._first), i + 1)
        powers = self._powers[steps.start - steps.stop :]
        tables.rewards[steps] += powers * reward
        tables.masks[steps] = powers * mask
        tables.next_rows[steps] = row
        # those that lead to the newest state have its action as the next one only when it is taken
        tables.next_steps[max(i - self.n_step, self._first) : i + 1] = i
        self._states, self.added = row + 1, i + 1
        self._size.fill_(self.added)

    @property
    def state(self) -> Tensor:
        """The newest state, (obs_dim,)."""
        return self.online.states[self._states - 1]

    def last(self, steps: int) -> tuple[Tensor, Tensor]:
        """The states (steps + 1, obs_dim) and actions (steps, d) of the last transitions.

        Raises:
            ValueError: the episode under way has fewer.
        """
        if steps > self.added - self._first:
            raise ValueError(f"the episode under way has {self.added - self._first} steps, not {steps}")
        states, actions = self.online.states, self.online.actions
        return states[self._states - steps - 1 : self._states], actions[self.added - steps : self.added]

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Draw ``batch_size`` transitions with replacement; ``generator`` must be on the data's device."""
        return self.take(self.draw(batch_size, generator))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the indices of ``batch_size`` transitions; the online ones follow the offline ones."""
        offline = len(self.offline)
        if self.mixture == "all":
            return self._below(self._size + offline, batch_size, generator)
        half = batch_size // 2
        old = self.offline.draw(batch_size, generator)
        new = offline + self._below(self._size, half, generator)
        return torch.cat([old[half:], torch.where(self._size > 0, new, old[:half])])

    @staticmethod
    def _below(bound: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """Random indices below a bound on the device. In float32 some would come up more often than others."""
        return (torch.rand(count, generator=generator, dtype=torch.float64, device=bound.device) * bound).long()

    def take(self, index: Tensor) -> Batch:
        """The transitions at these indices, in the shape of ``index``."""
        offline = len(self.offline)
        # Both parts are asked for all rows, because a CUDA graph has no varying number of them; one answer is dropped.
        old, new = self.offline.take(index.clamp(max=offline - 1)), self.online.take((index - offline).clamp(min=0))
        is_old = index < offline

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(is_old if old.ndim == is_old.ndim else is_old.unsqueeze(-1), old, new)

        return Batch(*(chosen(*columns) for columns in zip(old, new)))  # type: ignore[arg-type]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The filled part of the online tables."""
        filled = {name: self.added for name in TABLES} | {"states": self._states}
        return {name: getattr(self.online, name)[:rows] for name, rows in filled.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: it did not return these.
        """
        self._check(tensors)
        for name, tensor in tensors.items():
            getattr(self.online, name)[: len(tensor)] = tensor
        self.added, self._states = len(tensors["rows"]), len(tensors["states"])
        earlier = self._states - self.added - 1  # each episode has one state more than transitions
        self._first = int((tensors["rows"].cpu() - torch.arange(self.added) < earlier).sum())
        self._size.fill_(self.added)

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tables that do not fit into these, or have numbers of rows that are not there."""
        if odd := sorted(tensors.keys() ^ set(TABLES)):
            raise ValueError(f"its replay {'lacks' if odd[0] in TABLES else 'should not have'} {odd[0]:.100}")
        (states,), (added,) = (tensors[name].shape[:1] or (0,) for name in ("states", "rows"))
        for name, found in tensors.items():
            table, rows = getattr(self.online, name), states if name == "states" else added
            if found.shape != (rows, *table.shape[1:]) or found.dtype != table.dtype or rows > len(table):
                like = f"{(rows, *table.shape[1:])} {table.dtype}"
                raise ValueError(
                    f"its replay has {name} {tuple(found.shape)} {found.dtype}; {like} would fit, at most {len(table)}"
                )
            if found.dtype.is_floating_point and not found.isfinite().all():
                raise ValueError(f"its replay has NaN or infinity in {name}")
        for name, least, below in (("rows", 0, states), ("next_rows", 1, states), ("next_steps", 0, added)):
            if added and not least <= int(tensors[name].min()) <= int(tensors[name].max()) < below:
                raise ValueError(f"its replay has {name} outside {least} to {below - 1}")
        # an episode has one state more than transitions, so that from one to the next two rows are passed
        follow = tensors["rows"].cpu().diff(prepend=torch.tensor([-1]), append=torch.tensor([states - 1]))
        if added and not set(follow.tolist()) <= {1, 2}:
            raise ValueError("its replay has rows that are not one episode after the other")
