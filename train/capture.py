"""An update as CUDA graphs: recorded once, then replayed with one launch and hardly any work for the host.

A graph is recorded for each set of losses, with and without what is logged. The first updates of each set run plainly,
on a stream of their own: Triton compiles its kernels then, and cuBLAS makes its workspaces. They are updates like the
others, and so is the recorded one: nothing runs while it is recorded, and it is replayed at once.

Replays draw as plain updates do: the generators are registered with the graph, which advances them by what it draws, so
that their states, and with them checkpoints, are those of a run without graphs. Everything else that changes between
replays is read from device memory: the data, the parameters, Adam's state and count of steps, the learning rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from train.agents.base import Parts

Output = TypeVar("Output")
PLAIN_UPDATES = 3
"""Before a graph is recorded, as PyTorch's notes on CUDA graphs advise."""


class CaptureError(RuntimeError):
    """The update cannot be recorded on this machine; the message says why and what to do."""


class CapturedUpdate(Generic[Output]):
    """``update(parts, log)`` with graphs in its place as soon as there are any.

    Args:
        update: one whole update on the current CUDA device. It must not wait for the device, and what it reads and
            writes must stay where it is.
        generators: every CUDA generator that it draws from.

    A call returns what ``update`` returns; with graphs these are the same tensors each time, which the next call with
    the same arguments overwrites.
    """

    def __init__(self, update: Callable[[Parts, bool], Output], generators: Sequence[torch.Generator]) -> None:
        self._update, self._generators = update, generators
        self._plain_updates: Counter[tuple[Parts, bool]] = Counter()
        self._graphs: dict[tuple[Parts, bool], tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, parts: Parts, log: bool) -> Output:
        key = parts, log
        if key not in self._graphs and self._plain_updates[key] < PLAIN_UPDATES:
            self._plain_updates[key] += 1
            return self._run_plainly(parts, log)
        if key not in self._graphs:
            self._graphs[key] = self._record(parts, log)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _run_plainly(self, parts: Parts, log: bool) -> Output:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._update(parts, log)
        current.wait_stream(self._stream)
        return output

    def _record(self, parts: Parts, log: bool) -> tuple[torch.cuda.CUDAGraph, Output]:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                output = self._update(parts, log)
        except RuntimeError as error:
            raise CaptureError(
                f"the update ({', '.join(parts)}) cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}\n"
                "--capture off runs it without graphs"
            ) from error
        return graph, output
