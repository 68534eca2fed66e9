"""Images that are moved a little, for training."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SHIFT = 3
"""How far augmentation moves an image, in pixels."""


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images (B, height, width, channels) moved by whole pixels; those at the edge are repeated.

    Padding by `MOST_SHIFT` and cropping at ``offsets`` + `MOST_SHIFT` gives the same.

    Args:
        offsets: (B, 2) int64, rows and columns by which the crop moves.
    """
    _, height, width, _ = images.shape
    rows = (torch.arange(height, device=images.device) + offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offsets[:, 1:]).clamp(0, width - 1)
    each = torch.arange(len(images), device=images.device)
    return images[each[:, None, None], rows[:, :, None], columns[:, None, :]]
