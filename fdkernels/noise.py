"""Draw the noise that a caller does not give: from PyTorch's generators, or from a seed of our own (``philox.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fdkernels.philox import check_seed
from fdkernels.philox import draw as draw_from_seed


def check_source(
    op: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> int | Tensor | None:
    """The checked seed, or None if noise is not drawn from one."""
    if seed is not None and generator is not None:
        raise ValueError(f"{op}: seed and generator exclude each other")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"{op}: generator must be on {device}, where it draws, got {generator.device}")
    return None if seed is None else check_seed(op, seed, device)


def draw(
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    first: int = 0,
) -> Tensor:
    """N(0, I) in the dtype and on the device of ``like``; a seed's numbers begin at position ``first``."""
    if seed is not None:
        return draw_from_seed(seed, shape, like.device, like.dtype, first)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
