"""The log-density of actions under a flow, by its own ordinary differential equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fdkernels

STEPS = 20


@torch.no_grad()
def log_prob(flow: fdkernels.VelocityMLP, obs: Tensor, actions: Tensor) -> Tensor:
    """log p(a | s) for observations (..., c) and actions (..., d), by RK4 in both directions: (...).

    The flow carries the action back to noise, and noise forward with its Jacobian; p(a) = N(x0)/|det J|.
    """
    noise = noise_of(flow, obs, actions)
    _, jacobian = fdkernels.flow_jacobian(flow, noise, obs, num_steps=STEPS, method="rk4", clip=None)
    log_normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
    return log_normal - torch.linalg.slogdet(jacobian)[1]


@torch.no_grad()
def noise_of(flow: fdkernels.VelocityMLP, obs: Tensor, actions: Tensor) -> Tensor:
    """The noise that the flow would carry to these actions, (..., d)."""
    backward = [1 - i / STEPS for i in range(STEPS + 1)]
    return fdkernels.integrate_flow(flow, actions, obs, time_grid=backward, method="rk4", clip=None)
