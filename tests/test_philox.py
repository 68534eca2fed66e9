"""The counter-based normals: published vectors, Triton's own numbers, their distribution."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fdkernels.philox import _uniform, philox, philox_normal
from tests.judge import assert_agree

ROOT = Path(__file__).parent.parent

# known answers of Random123 for philox4x32-10: counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    ours = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in ours) == words


SEEDS = (0, 123456789012345678, -5, 2**63 - 1)
FIRSTS = (0, 7, 2**31 - 5, 2**40 + 3)

TRITON = f"""
import sys, torch, triton, triton.language as tl

@triton.jit
def draw(out, seed, first, BLOCK: tl.constexpr, INT: tl.constexpr):
    position = tl.arange(0, BLOCK)
    tl.store(out + position, tl.randn(seed, (first + position.to(tl.int64)).to(INT)))

# before 3.4 it takes another generator for positions of 64 bits
wide = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)

out = torch.empty({len(SEEDS)}, {len(FIRSTS)}, 128)
for i, seed in enumerate({SEEDS}):
    for j, first in enumerate({FIRSTS}):
        draw[(1,)](out[i, j], seed, first, BLOCK=128, INT=tl.int64 if wide else tl.int32)
torch.save((out, wide), sys.argv[1])
"""


def exact_normal(seed: int, first: int) -> Tensor:
    """Box-Muller in float64, from the float32 uniforms."""
    position = torch.arange(first, first + 128)
    words = philox(
        (position & 0xFFFFFFFF, position >> 32, 0 * position, 0 * position),
        (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF),
    )
    radius, angle = (_uniform(word).double() for word in words[:2])
    return torch.sqrt(-2 * torch.log(radius.clamp(min=1e-7))) * torch.cos(2 * math.pi * angle)


def test_the_numbers_are_those_of_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "draw.py").write_text(TRITON)
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, tmp_path / "draw.py", tmp_path / "out.pt"], cwd=ROOT, env=environment, check=True)
    theirs, wide = torch.load(tmp_path / "out.pt")
    for i, seed in enumerate(SEEDS):
        for j, first in enumerate(FIRSTS if wide else FIRSTS[:-1]):
            ours = philox_normal(seed, (128,), "cpu", torch.float32, first=first)
            assert_agree(ours, theirs[i, j], exact_normal(seed, first))


def test_any_cut_gives_the_same_numbers() -> None:
    whole = philox_normal(3, (4, 5, 6), "cpu", torch.float32)
    assert torch.equal(philox_normal(3, (2, 5, 6), "cpu", torch.float32, first=60), whole[2:])
    assert torch.equal(philox_normal(torch.tensor(3), (120,), "cpu", torch.float32), whole.flatten())
    assert torch.equal(philox_normal(3, (4, 5, 6), "cpu", torch.bfloat16), whole.bfloat16())
    assert torch.equal(
        philox_normal(2**64 - 5, (9,), "cpu", torch.float64), philox_normal(-5, (9,), "cpu", torch.float64)
    )
    assert philox_normal(3, (0, 2), "cpu", torch.float32).shape == (0, 2)


def test_a_batch_of_seeds() -> None:
    seeds = torch.tensor([3, -4, 2**40])
    together = torch.func.vmap(lambda seed: philox_normal(seed, (5,), "cpu", torch.float32))(seeds)
    for row, seed in zip(together, seeds):
        assert torch.equal(row, philox_normal(seed.item(), (5,), "cpu", torch.float32))


def distance(sample: Tensor) -> float:
    """Kolmogorov-Smirnov distance from N(0, 1) times √n, which exceeds 1.95 once in a thousand."""
    ordered, n = sample.flatten().double().sort().values, sample.numel()
    cdf, steps = torch.special.ndtr(ordered), torch.arange(n + 1, dtype=torch.float64) / n
    return max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()).item() * math.sqrt(n)


def test_distribution() -> None:
    n = 400_000
    x = philox_normal(2024, (n,), "cpu", torch.float32).double()
    assert distance(x) < 1.95
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        z = (x.pow(power).mean() - moment) / math.sqrt(variance / n)
        assert abs(z) < 4, f"moment {power}: {z:.1f} standard errors"
    assert x.abs().max() > 4.2, "400,000 normals without a tail"
    spoiled = distance(x * 1.01)
    assert spoiled > 1.95, f"a scale off by 1 % goes unnoticed: {spoiled}"


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 6144])
def test_neighbours_are_independent(lag: int) -> None:
    n = 200_000
    x = philox_normal(5, (n + lag,), "cpu", torch.float32).double()
    for a, b in ((x[:n], x[lag:]), (x[:n] ** 2 - 1, x[lag:] ** 2 - 1)):
        z = (a * b).sum() / (a.norm() * b.norm()) * math.sqrt(n)
        assert abs(z) < 4, f"correlation at lag {lag}: {z:.1f} standard errors"


@pytest.mark.parametrize("other", [8, 2**32 + 7, -7])
def test_streams_of_different_seeds_are_independent(other: int) -> None:
    n = 200_000
    x, y = (philox_normal(seed, (n,), "cpu", torch.float32).double() for seed in (7, other))
    z = (x * y).mean() * math.sqrt(n)
    assert abs(z) < 4, f"correlation of seeds 7 and {other}: {z:.1f} standard errors"
    assert distance((x + y) / math.sqrt(2)) < 1.95


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"first must be an integer of at least 0 .*got -1"):
        philox_normal(1, (2,), "cpu", torch.float32, first=-1)
    with pytest.raises(TypeError, match="got float"):
        philox_normal(1.5, (2,), "cpu", torch.float32)
