"""A sequence of launches as a CUDA graph: recorded when it is called a second time, replayed from then on."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fdkernels.torch_private import clear_cublas_workspaces

Function: TypeAlias = Callable[[Any, Any, Any], tuple[Tensor, ...]]
MOST = 16
"""Sequences remembered; the one not called for longest is forgotten first, and its memory left to the others."""


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Any
    outputs: tuple[Tensor, ...]


_recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None: called once
_lock = threading.Lock()


def replayed(
    function: Function, inputs: NamedTuple, parameters: Sequence[Tensor | None], settings: Hashable
) -> tuple[Tensor, ...]:
    """``function(inputs, parameters, settings)``, which does nothing but launch kernels, by a graph if there is one.

    Args:
        inputs: a record of tensors, or None. They are copied to where the graph reads them, and outputs are fresh.
        parameters: read where they are: a graph sees what an optimiser did to them, and one that moved makes another
            call of it.

    On another stream than the default one the caller is capturing a graph, or about to, and the launches become part of
    that.
    """
    device = next(tensor.device for tensor in inputs if tensor is not None)
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return function(inputs, parameters, settings)
    with torch.cuda.device(device), _lock:
        addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in parameters)
        forms = tuple(map(_form, (*inputs, *parameters)))
        key = (function, device, addresses, forms, settings, torch.get_float32_matmul_precision())
        recording = _remembered(key, lambda: _record(function, inputs, parameters, settings))
        if recording is None:
            return function(inputs, parameters, settings)
        for place, tensor in zip(recording.inputs, inputs):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)


def _remembered(key: Hashable, record: Callable[[], Recording]) -> Recording | None:
    """None at the first call, so that what happens once, or with ever other shapes, is never recorded."""
    recording = _recordings.get(key)
    if recording is None and key in _recordings:
        recording = record()
    _recordings[key] = recording
    _recordings.move_to_end(key)
    if len(_recordings) > MOST:
        _recordings.popitem(last=False)
    return recording


def _form(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


@functools.cache
def _recorder(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    """Where a device's graphs are recorded. They are replayed one after another, and so can share their memory."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def _record(function: Function, inputs: Any, parameters: Sequence[Tensor | None], settings: Hashable) -> Recording:
    current = torch.cuda.current_stream()
    side, pool = _recorder(current.device)
    graph = torch.cuda.CUDAGraph()
    # Tensors of inference mode could not be written to outside of it; leaving it turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        places = inputs._make(None if tensor is None else tensor.clone() for tensor in inputs)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # plainly once more: nothing may be compiled while recording
            function(places, parameters, settings)
        # A workspace of cuBLAS that the graph uses has to be the graph's, and nobody else's.
        clear_cublas_workspaces()
        # Other threads may go on using the GPU.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            outputs = function(places, parameters, settings)
        clear_cublas_workspaces()
        current.wait_stream(side)
    return Recording(graph, places, outputs)
