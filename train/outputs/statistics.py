"""Interquartile means of the scores of several seeds and tasks, with their intervals."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Middle: TypeAlias = tuple[float, tuple[float, float]]
"""An interquartile mean and its interval."""


def interquartile_mean(scores: Sequence[float]) -> Middle:
    """Mean of the middle half of one or more scores, with its 95 % percentile-bootstrap interval over seeds.

    This is what rliable reports for one task (arXiv 2108.13264, 2,000 resamples). Two or three scores are all kept, and
    the interval of a single one has no width.
    """
    return mean_of_tasks([scores])


def mean_of_tasks(scores: Sequence[Sequence[float]]) -> Middle:
    """The mean of several tasks' interquartile means; its interval comes from resampling the seeds of each task."""
    return _mean_of_tasks(tuple(map(tuple, scores)))


@functools.lru_cache(maxsize=4096)  # a sweep asks again for each cell of its table, of which few have changed
def _mean_of_tasks(scores: tuple[tuple[float, ...], ...]) -> Middle:
    from scipy.stats import bootstrap, trim_mean  # takes a second to import, and most programs end without it

    single = [of_task[0] for of_task in scores if len(of_task) == 1]
    several = [of_task for of_task in scores if len(of_task) > 1]

    def mean(*samples: Any, axis: int = -1) -> Any:
        return (sum(single) + sum(trim_mean(sample, 0.25, axis=axis) for sample in samples)) / len(scores)

    middle = float(mean(*several))
    if not several:
        return middle, (middle, middle)
    rng = np.random.default_rng(0)
    found = bootstrap(several, mean, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return middle, (float(found.low), float(found.high))
