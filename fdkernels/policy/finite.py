"""Nothing goes on with a NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


class NotFinite(RuntimeError):
    """NaN or infinity in an observation, an action, or what a simulator answered; the message says where."""


def check_finite(what: str, values: Any) -> None:
    """Refuse NaN and infinity.

    Args:
        what: what ``values`` are, for the message.
        values: numbers, or a tensor of them; of integers, such as images, nothing is looked at.

    Raises:
        NotFinite: one of them is NaN or infinite.
    """
    if isinstance(values, Tensor):
        if not values.is_floating_point() or values.isfinite().all():
            return
        values = values.cpu().double()  # in this order, because not every device has float64
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
        at = tuple(int(where) for where in np.argwhere(~np.isfinite(values))[0])
        raise NotFinite(f"{what} has {values[at]}" + (f" at {at}" if at else ""))
