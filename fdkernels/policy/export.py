"""A policy as a graph of PyTorch's or ONNX's own operators, which runs without this library."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fdkernels.policy.acting import Acting
from fdkernels.policy.network import FlowPolicy, check_float32
from fdkernels.policy.player import Policy
from fdkernels.policy.whole import write_whole

SUFFIXES = (".pt2", ".onnx")
INPUTS, OUTPUT = ("observation", "noise"), "action"


def export_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Write the policy's acting rule with its networks as a pure function (observation, noise) -> action.

    The file is written whole or not at all.

    The graph is the same on every machine: it has no kernels, and nothing that only suits this processor. The batch
    size is free; the rule, its N and the weights are fixed. Noise and the frames before are the caller's.

    - observation: (B, c) float32, raw (it is standardised inside), or (B, height, width, channels) uint8 with all
      stacked frames, the oldest first
    - noise: (B, N, d) float32 from N(0, I); N is 1 for rules that draw one action
    - action: (B, d) float32, within [-1, 1]

    Args:
        policy: as from `load_policy`, on any device, with networks in float32. It is left as it is.
        path: the file to write. Ending in ``.pt2``: for ``torch.export.load(path).module()``. Ending in ``.onnx``: for
            a runtime of ONNX.

    Raises:
        ValueError: the path ends in something else or is no regular file, or the networks are not float32.
        OSError: the file cannot be written.
        ImportError: onnxscript, which an ``.onnx`` needs, is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export_policy: path must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    check_float32("export_policy", policy.network)
    write_whole(path, _pt2(policy) if path.suffix == ".pt2" else _onnx(policy))


def _pt2(policy: Policy) -> bytes:
    file = io.BytesIO()
    torch.export.save(trace(policy), file)
    return file.getvalue()


def _onnx(policy: Policy) -> bytes:
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError(f"export_policy: an .onnx needs onnxscript ({error}): pip install onnxscript") from error
    with _quiet():
        program = torch.onnx.export(
            trace(policy),
            dynamo=True,
            input_names=INPUTS,
            output_names=[OUTPUT],
            dynamic_shapes={"observation": {0: "batch"}, "noise": {}},  # the name of that dimension, which both share
            verbose=False,
        )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
        return content


def trace(policy: Policy) -> torch.export.ExportedProgram:
    """The policy as an exported program on the CPU."""
    function = _Function(copy.deepcopy(policy.network).cpu(), policy.acting).requires_grad_(False)
    mean = function.network.obs_mean
    rows = 2  # PyTorch would take sizes of 0 and 1 for constants
    observation = torch.zeros(rows, *mean.shape, dtype=torch.uint8 if mean.ndim > 1 else torch.float32)
    noise = torch.zeros(rows, policy.acting.draws, policy.action_dim)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(function, (observation, noise), dynamic_shapes={name: {0: batch} for name in INPUTS})


class _Function(nn.Module):
    def __init__(self, network: FlowPolicy, acting: Acting) -> None:
        super().__init__()
        self.network, self.acting = network, acting

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        return self.acting(self.network, self.network.observe(observation), noise)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not installed, and of its own use of PyTorch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
