"""A trace of a few updates, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from train.agents import Parts

Output = TypeVar("Output")
FIRST, LAST = 10, 15
"""Updates of the agent that are traced: by then graphs are recorded and memory is allocated."""


class ProfiledUpdate(Generic[Output]):
    """``update(parts, log)``, some updates of the whole agent among them traced into ``path``."""

    def __init__(self, update: Callable[[Parts, bool], Output], path: Path) -> None:
        self._update, self._path = update, path
        self._updates = self.traced = 0
        self._profile: profile | None = None

    def __call__(self, parts: Parts, log: bool) -> Output:
        if "actor" not in parts:
            return self._update(parts, log)
        if self._updates == FIRST:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()
        output = self._update(parts, log)
        self._updates += 1
        self.traced += self._profile is not None
        if self._updates == LAST:
            self.close()
        return output

    def close(self) -> None:
        """Write what has been traced. To be called wherever training ends: a profiler must not be left running."""
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None

    @property
    def outcome(self) -> str:
        """For people."""
        if self.traced:
            return f"profile    {self._path}: {self.traced} updates, to be opened at https://ui.perfetto.dev"
        return f"profile    none: it begins after {FIRST} updates of the agent, and this run made {self._updates}"
