"""Our agent's parameters with `EagerAgent`'s names and layout, to start the peers equal and to compare them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from train.agents.base import Agent

Read = Callable[[nn.Parameter], Tensor]


def parameters(agent: Agent, read: Read = lambda p: p.detach()) -> dict[str, Tensor]:
    """Each parameter, or what ``read`` maps it to: a tensor of its shape, such as its gradient or Adam's moment."""
    found = {f"flow.{name}": read(p) for name, p in agent.flow.net.named_parameters()}
    found |= {f"actor.{name}": read(p) for name, p in agent.actor.named_parameters()}
    for name, critic in (("critics", agent.critic), ("target_critics", agent.target_critic)):
        stride = 3 if len(critic.scales) else 2  # linear, activation, layer norm
        for which in range(2):
            for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
                found[f"{name}.{which}.{stride * i}.weight"] = read(weight)[which].T
                found[f"{name}.{which}.{stride * i}.bias"] = read(bias)[which, 0]
            for i, (scale, shift) in enumerate(zip(critic.scales, critic.shifts)):
                found[f"{name}.{which}.{stride * i + 2}.weight"] = read(scale)[which, 0]
                found[f"{name}.{which}.{stride * i + 2}.bias"] = read(shift)[which, 0]
    if hasattr(agent, "log_alpha"):
        found["log_alpha"] = read(agent.log_alpha)
    return found
