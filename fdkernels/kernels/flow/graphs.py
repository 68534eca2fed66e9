"""Run a sequence of launches as a CUDA graph, recorded at the second call and replayed from then on."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fdkernels.backend import float32_products
from fdkernels.torch_private import own_cublas_workspace

Function: TypeAlias = Callable[[Any, Any, Any], tuple[Tensor, ...]]
MAX_RECORDINGS = 16
"""Sequences remembered. The least recently called one is forgotten first, and the others reuse its memory."""


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Any
    outputs: tuple[Tensor, ...]


_recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None: called once
_lock = threading.Lock()


def replayed(
    function: Function, inputs: NamedTuple, parameters: Sequence[Tensor | None], settings: Hashable
) -> tuple[Tensor, ...]:
    """``function(inputs, parameters, settings)``, by a graph if there is one. The function must only launch kernels.

    Args:
        inputs: a record whose fields are tensors or None. They are copied to where the graph reads; outputs are fresh.
        parameters: read in place, so that a graph sees what an optimiser did to them. If one has moved, the call counts
            as a different one.

    On a stream other than the default, the caller is capturing a graph or is about to, so the launches become part of
    that graph.
    """
    device = next(tensor.device for tensor in inputs if tensor is not None)
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return function(inputs, parameters, settings)
    with torch.cuda.device(device), _lock:
        addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in parameters)
        forms = tuple(map(_form, (*inputs, *parameters)))
        key = (function, device, addresses, forms, settings, float32_products())
        recording = _remembered(key, lambda: _record(function, inputs, parameters, settings))
        if recording is None:
            return function(inputs, parameters, settings)
        for place, tensor in zip(recording.inputs, inputs):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)


def _remembered(key: Hashable, record: Callable[[], Recording]) -> Recording | None:
    """None at the first call, so that a call made only once, or with ever new shapes, is never recorded."""
    recording = _recordings.get(key)
    if recording is None and key in _recordings:
        recording = record()
    _recordings[key] = recording
    _recordings.move_to_end(key)
    if len(_recordings) > MAX_RECORDINGS:
        _recordings.popitem(last=False)
    return recording


def _form(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


@functools.cache
def _recorder(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    """Stream and memory pool for a device's graphs, which can share memory because they are replayed one by one."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def _record(function: Function, inputs: Any, parameters: Sequence[Tensor | None], settings: Hashable) -> Recording:
    current = torch.cuda.current_stream()
    side, pool = _recorder(current.device)
    graph = torch.cuda.CUDAGraph()
    # Tensors made in inference mode cannot be written to outside of it. Leaving it turns gradients on, hence no_grad.
    with torch.inference_mode(False), torch.no_grad():
        places = inputs._make(None if tensor is None else tensor.clone() for tensor in inputs)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # run once first: nothing may be compiled while recording
            function(places, parameters, settings)
        # "thread_local" lets other threads go on using the GPU.
        recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        with own_cublas_workspace(), recording:
            outputs = function(places, parameters, settings)
        current.wait_stream(side)
    return Recording(graph, places, outputs)
