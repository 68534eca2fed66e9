"""A trace of a few updates, and a table of the operations that took longest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from train.agents.base import Parts

Output = TypeVar("Output")
FIRST, LAST = 10, 15
"""The agent's updates to trace: by then graphs are recorded and memory is allocated."""


class ProfiledUpdate(Generic[Output]):
    """Calls ``update(parts, log)``, and traces a few updates of the whole agent into ``path``."""

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
        """Write the trace so far. Call this however training ends: a profiler must not be left running."""
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        longest = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=longest, row_limit=30, max_name_column_width=70)
        self._path.with_suffix(".txt").write_text(f"{self.traced} updates\n{table}\n")
        self._profile = None

    @property
    def outcome(self) -> str:
        """A line to print: where the trace is, or why there is none."""
        if self.traced:
            table = self._path.with_suffix(".txt").name
            return (
                f"profile    {self._path}: {self.traced} updates, to be opened at https://ui.perfetto.dev; what took "
                f"longest is in {table} beside it"
            )
        return f"profile    none: it begins after {FIRST} updates of the agent, and this run made {self._updates}"
