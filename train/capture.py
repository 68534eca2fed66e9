"""Updates as CUDA graphs: recorded once, then replayed with one launch and hardly any work for the host.

Each set of losses has two graphs, with and without logging. The first updates of each kind run without a graph, on a
side stream, so that Triton compiles its kernels and cuBLAS makes its workspaces. They are updates like the others, and
so is the recorded one: recording runs nothing, and the graph is replayed at once.

Replays draw the same random numbers as plain updates. The generators are registered with the graph, which advances them
by what it draws, so their states, and therefore the checkpoints, are those of a run without graphs. Everything else
that changes between replays is read from device memory: the data, the parameters, Adam's state and step count, and the
learning rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from fdkernels.torch_private import own_cublas_workspace
from train.agents.base import Parts

Output = TypeVar("Output")
PLAIN_UPDATES = 3
"""Updates before a graph is recorded, as PyTorch's notes on CUDA graphs advise."""


class CaptureError(RuntimeError):
    """The update cannot be recorded on this machine; the message says why and what to do."""


class CapturedUpdate(Generic[Output]):
    """Calls ``update(parts, log)`` until its graph is recorded, then replays the graph.

    Args:
        update: one whole update on the current CUDA device. It must not wait for the device, and the tensors that it
            reads and writes must stay in place.
        generators: all CUDA generators that it draws from.

    A call returns what ``update`` returns. With graphs these are the same tensors each time: the next call with the
    same arguments overwrites them.
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

    def forget(self) -> None:
        """Begin again, because the update now reads other tensors than those in its graphs."""
        self._graphs.clear()
        self._plain_updates.clear()

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
            with own_cublas_workspace(), torch.cuda.graph(graph, stream=self._stream):
                output = self._update(parts, log)
        except RuntimeError as error:
            raise CaptureError(
                f"the update ({', '.join(parts)}) cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}\n"
                "--capture off runs it without graphs"
            ) from error
        return graph, output
