"""Sampling a batch of transitions: tensor rows, NumPy rows, PyTorch's DataLoader, TorchRL's buffer, and ours.

    pytest benchmarks --benchmark-only -k sampling

Each puts its batch on the device. The rewards are row numbers, to check that the columns of a batch belong together.
Ours has one column more than the others, the next actions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.harness import DEVICE, Entry, Race, WrongResult
from benchmarks.peers.eager_agent import ReplayBuffer
from benchmarks.updates import COLUMNS, TRANSITIONS, dataset
from train.data.transitions import OfflineDataset

Sample = Callable[[], dict[str, Tensor]]
OBS, D = 17, 6


@functools.cache
def numbered() -> OfflineDataset:
    data = dataset(OBS, D)
    assert TRANSITIONS <= 2**24  # float32 holds all integers up to there
    data.rewards.copy_(torch.arange(TRANSITIONS))
    return data


def numpy_rows(data: OfflineDataset, batch: int) -> Sample:
    """The published agents' buffer."""
    columns = {name: getattr(data, name).cpu().numpy() for name in COLUMNS}

    def sample() -> dict[str, Tensor]:
        rows = np.random.randint(len(data), size=batch)  # noqa: NPY002 (as it is written there)
        return {name: torch.from_numpy(column[rows]).to(DEVICE) for name, column in columns.items()}

    return sample


def tensor_rows(data: OfflineDataset, batch: int) -> Sample:
    """CORL's buffer."""
    buffer = ReplayBuffer({name: getattr(data, name) for name in COLUMNS})
    return lambda: buffer.sample(batch)


def data_loader(data: OfflineDataset, batch: int) -> Sample:
    rows = TensorDataset(*(getattr(data, name).cpu() for name in COLUMNS))
    sampler = RandomSampler(rows, replacement=True, num_samples=2**62)

    def batches() -> Iterator[list[Tensor]]:
        yield from DataLoader(rows, batch_size=batch, sampler=sampler)

    source = batches()
    return lambda: {name: column.to(DEVICE) for name, column in zip(COLUMNS, next(source))}


def torchrl_buffer(data: OfflineDataset, batch: int) -> Sample:
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data), device=DEVICE), batch_size=batch)
    buffer.extend(TensorDict({name: getattr(data, name) for name in COLUMNS}, batch_size=[len(data)]))
    return buffer.sample


def ours(data: OfflineDataset, batch: int) -> Sample:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return lambda: data.sample(batch, generator)._asdict()


CONTESTANTS = {
    "eager": tensor_rows,
    "NumPy": numpy_rows,
    "DataLoader": data_loader,
    "TorchRL": torchrl_buffer,
    "ours": ours,
}


@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize("variant", CONTESTANTS)
def test_sampling(race: Race, variant: str, batch: int) -> None:
    data = numbered()
    numbers = batch * (2 * OBS + D + 2)
    entry = Entry(
        op="data sampling",
        variant=variant,
        sizes={"batch": batch, "obs": OBS, "d": D, "of": TRANSITIONS},
        calls=5,
        bytes=8.0 * numbers,
    )

    def judge(i: int, sampled: dict[str, Tensor]) -> float:
        rows = sampled["rewards"].long()
        if len(rows) != batch or len(rows.unique()) < batch / 2:
            raise WrongResult(f"{variant}: {len(rows)} rows, {len(rows.unique())} different ones")
        for name in COLUMNS:
            if not torch.equal(sampled[name], getattr(data, name)[rows]):
                raise WrongResult(f"{variant}: {name} are not those of the rows drawn")
        return 0.0

    run, baseline = CONTESTANTS[variant](data, batch), tensor_rows(data, batch)
    race(entry, lambda i: run(), lambda i: baseline(), judge)
