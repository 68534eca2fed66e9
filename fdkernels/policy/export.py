"""A policy as a graph of PyTorch's or ONNX's own operators, which runs without this library."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fdkernels.policy.acting import Acting
from fdkernels.policy.network import FlowPolicy
from fdkernels.policy.player import Policy

SUFFIXES = (".pt2", ".onnx")
INPUTS, OUTPUT = ("observation", "noise"), "action"
OPSET = 20
"""ONNX's first version with GELU as an operator."""


def export_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Write the policy's acting rule with its networks as a pure function (observation, noise) -> action.

    The graph is the same on every machine: it has neither kernels nor what suits this processor. The batch size is
    free. The rule, its N and the weights are fixed, and a frame's history is the caller's.

    ============  ===================================================================================================
    observation   (B, c) float32, raw: it is standardised inside; or (B, height, width, channels) uint8, with all
                  stacked frames, the oldest first
    noise         (B, N, d) float32, drawn from N(0, I); N is 1 for rules that take one sample
    action        (B, d) float32, within [-1, 1]
    ============  ===================================================================================================

    Args:
        policy: as from `load_policy`, on any device; networks in float32. It is left as it is.
        path: a file to write. Ending in ``.pt2``: for ``torch.export.load(path).module()``. Ending in ``.onnx``: for
            any runtime of ONNX, with operators of version 20.

    Raises:
        ValueError: the path ends in something else, or the networks are not float32.
        ImportError: onnx and onnxscript, which an ``.onnx`` file needs, are not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export_policy: path must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    if policy.network.obs_mean.dtype != torch.float32:
        raise ValueError(f"export_policy: policy must be in float32, got {policy.network.obs_mean.dtype}")
    if path.suffix == ".pt2":
        torch.export.save(traced(policy), path)
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_policy: an .onnx file needs onnx and onnxscript ({error}): pip install onnx onnxscript, or "
            "fdkernels[onnx]"
        ) from error
    program = torch.onnx.export(
        traced(policy), dynamo=True, input_names=INPUTS, output_names=[OUTPUT], opset_version=OPSET, verbose=False
    )
    assert program is not None
    program.save(path)


def traced(policy: Policy) -> torch.export.ExportedProgram:
    """The policy as an exported program, on the CPU."""
    function = _Function(copy.deepcopy(policy.network).cpu(), policy.acting)
    mean = function.network.obs_mean
    rows = 2  # with one, or none, PyTorch would take the size for a constant
    observation = torch.zeros(rows, *mean.shape, dtype=mean.dtype if mean.ndim == 1 else torch.uint8)
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
