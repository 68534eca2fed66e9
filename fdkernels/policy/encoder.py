"""The encoder of images: what a network takes of an observation instead of its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fdkernels.cpu.layers import gelu_tanh

EncoderName = Literal["none", "impala-small"]
FEATURES = 512
"""Width of an encoding."""
CHANNELS = (16, 32, 32)
HALVINGS = 2 ** len(CHANNELS)


class ImpalaSmall(nn.Module):
    """IMPALA's convolutions (arXiv 1802.01561) with one residual block in each stack, as in FQL (arXiv 2502.02538).

    Weights start Glorot-uniform, biases at zero.

    Args:
        shape: height, width and channels of an image.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) != 3 or any(side % HALVINGS or not side for side in shape[:2]):
            raise ValueError(
                f"encoder impala-small takes images whose height and width are multiples of {HALVINGS}, and the "
                f"observations have shape {tuple(shape)}"
            )
        height, width, channels = shape
        widths = (channels, *CHANNELS)
        self.stacks = nn.Sequential(*(Stack(before, after) for before, after in itertools.pairwise(widths)))
        self.linear = nn.Linear(height * width // HALVINGS**2 * CHANNELS[-1], FEATURES)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Encodings (B, FEATURES) of images (B, height, width, channels) with numbers from 0 to 255."""
        # Channels stay last in memory, which convolutions on the CPU prefer, and in which the published agents flatten.
        h = images.to(self.linear.weight.dtype).div(255).permute(0, 3, 1, 2)
        h = F.relu(self.stacks(h)).permute(0, 2, 3, 1).flatten(1)
        return gelu_tanh(self.linear(h))


class Stack(nn.Module):
    """A convolution, a pooling that halves height and width, and a residual block."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(before, after, 3, padding=1)
        self.inner = nn.Conv2d(after, after, 3, padding=1)
        self.outer = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # For even sides JAX's SAME pooling pads only at the end, as ceil_mode does. padding=1 would pad both ends.
        x = F.max_pool2d(self.enter(x), 3, stride=2, ceil_mode=True)
        return x + self.outer(F.relu(self.inner(F.relu(x))))
