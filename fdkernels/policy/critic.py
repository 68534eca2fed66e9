"""The twin critic. The weights of its two networks are stacked, so that both can run as one batched product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkernels.cpu import layers as cpu_layers
from fdkernels.cpu.layers import gelu_tanh


class TwinCritic(nn.Module):
    """Two independent Q networks on [observation, action]: linear, GELU (tanh form), layer norm; last a linear layer.

    Parameters have a leading axis of two: ``weights[i]`` is (2, inputs, outputs). Weights start Glorot-uniform, biases
    at zero.

    Args:
        obs_dim, action_dim: widths of the inputs.
        hidden: widths of the hidden layers.
        layer_norm: normalise after each activation (ε = 1e-6).
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: Sequence[int], layer_norm: bool = True) -> None:
        super().__init__()
        widths = [obs_dim + action_dim, *hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = (6 / (fan_in + fan_out)) ** 0.5
            self.weights.append(nn.Parameter(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.zeros(2, 1, fan_out)))
        if layer_norm:
            for width in hidden:
                self.scales.append(nn.Parameter(torch.ones(2, 1, width)))
                self.shifts.append(nn.Parameter(torch.zeros(2, 1, width)))

    def forward(self, obs: Tensor, action: Tensor, *, frozen: bool = False) -> Tensor:
        """Q values (2, batch). With ``frozen`` the parameters are constant, and only the action gets a gradient."""
        parameters = (self.weights, self.biases, self.scales, self.shifts)
        constant = (lambda p: p.detach()) if frozen else (lambda p: p)
        # by index, which PyTorch 2.7 can compile too
        weights, biases, scales, shifts = ([constant(ps[i]) for i in range(len(ps))] for ps in parameters)
        rows = torch.cat([obs, action], dim=-1)
        if cpu_layers.multiplies_apart(rows):
            return _apart(rows, weights, biases, scales, shifts)
        return _batched(rows, weights, biases, scales, shifts)


def _batched(
    rows: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor], shifts: list[Tensor]
) -> Tensor:
    h = rows.expand(2, -1, -1)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        h = torch.baddbmm(bias, h, weight)
        if i < len(weights) - 1:
            h = gelu_tanh(h)
            if scales:
                h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
                h = torch.addcmul(shifts[i], h, scales[i])
    return h.squeeze(-1)


def _apart(
    rows: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor], shifts: list[Tensor]
) -> Tensor:
    hs = [rows, rows]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        hs = [cpu_layers.linear(h, w.t(), b.squeeze(0)) for h, w, b in zip(hs, weight.unbind(), bias.unbind())]
        if i < len(weights) - 1:
            hs = [gelu_tanh(h) for h in hs]
            if scales:
                norms = zip(scales[i].squeeze(1).unbind(), shifts[i].squeeze(1).unbind())
                hs = [F.layer_norm(h, h.shape[-1:], *norm, eps=1e-6) for h, norm in zip(hs, norms)]
    return torch.stack(hs).squeeze(-1)
