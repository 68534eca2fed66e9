"""The networks of a trained policy, and what they compute. How they are used to act is in ``acting.py``.

An agent that learns (``train/agents`` in the repository) is one of these policies, with losses.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fdkernels.flow import integrate_flow
from fdkernels.networks import VelocityMLP, build_mlp
from fdkernels.policy.config import PolicyConfig
from fdkernels.policy.critic import TwinCritic
from fdkernels.policy.encoder import FEATURES, ImpalaSmall

NetworkName = Literal["flow", "actor", "critic"]
NETWORKS: tuple[NetworkName, ...] = ("flow", "actor", "critic")
"""Networks that see an image through encoders of their own, in the order of the encodings."""


class FlowPolicy(nn.Module, abc.ABC):
    """A behaviour flow, an actor beside it, and two critics for the acting rules that choose among actions.

    Actions are within [-1, 1]. Subclasses say what the actor does.

    Args:
        config: the sizes of the networks.
        observation: width of the states, or height, width and channels of the images (of all stacked frames together).
        action_dim: d.

    Raises:
        ValueError: the observations do not fit the encoder or the number of frames in the config.
    """

    actor_kind: ClassVar[str]
    """The name of what the actor does, in files."""
    refines: ClassVar[bool] = False
    """Whether the policy has `refine`, which some acting rules call."""
    config: PolicyConfig
    obs_mean: Tensor
    obs_std: Tensor

    def __init__(self, config: PolicyConfig, observation: int | Sequence[int], action_dim: int) -> None:
        super().__init__()
        shape = (observation,) if isinstance(observation, int) else tuple(observation)
        self.config = config
        self.action_dim = action_dim
        self.encoders = nn.ModuleDict()
        if config.encoder != "none":
            self.encoders.update({network: ImpalaSmall(shape) for network in NETWORKS})
        elif len(shape) > 1:
            raise ValueError(
                f"{type(self).__name__}: the observations are images of shape {shape}, which need "
                "encoder='impala-small'"
            )
        if config.frame_stack > 1 and (not self.encoders or shape[-1] % config.frame_stack):
            raise ValueError(
                f"{type(self).__name__}: the config stacks {config.frame_stack} frames, and observations of shape "
                f"{shape} are not as many images"
            )
        obs_dim = FEATURES if self.encoders else shape[0]
        self.flow = VelocityMLP(obs_dim, action_dim, config.actor_hidden, layer_norm=config.actor_layer_norm)
        # maps [observation, base action or noise] to the displacement or the action
        self.actor = build_mlp(
            obs_dim + action_dim, config.actor_hidden, action_dim, layer_norm=config.actor_layer_norm
        )
        self.critic = TwinCritic(obs_dim, action_dim, config.critic_hidden, config.critic_layer_norm)
        # used to standardise raw states before the networks see them; of images only their shape is used
        self.register_buffer("obs_mean", torch.zeros(shape))
        self.register_buffer("obs_std", torch.ones(shape))
        self._names = frozenset(self.state_dict())

    def acting_weights(self) -> dict[str, Tensor]:
        """The weights that acting takes, by their names: those of this class, none that a subclass adds to learn."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self._names}

    def view(self, network: NetworkName, obs: Tensor) -> Tensor:
        """What a network takes of observations (..., c) as `observe` gives them: its encoding, or the whole state."""
        return obs.narrow(-1, NETWORKS.index(network) * FEATURES, FEATURES) if self.encoders else obs

    @torch.no_grad()
    def observe(self, observations: Tensor) -> Tensor:
        """Raw observations as the methods below take them: standardised states, or encodings side by side."""
        if self.encoders:
            images = observations.to(self.obs_mean.device)
            return torch.cat([self.encoders[name](images) for name in NETWORKS], dim=-1)
        return (observations.to(self.obs_mean) - self.obs_mean) / self.obs_std

    @torch.no_grad()
    def flow_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The behaviour flow's action (..., d) for observations from `observe` and N(0, I) noise (..., d)."""
        return integrate_flow(self.flow, noise, self.view("flow", obs), num_steps=self.config.flow_steps)

    @abc.abstractmethod
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The policy's action (..., d), in [-1, 1], for observations from `observe` and N(0, I) noise (..., d)."""

    def refine(self, obs: Tensor, action: Tensor) -> Tensor:
        """A better action (..., d) near ``action``; only for policies that set ``refines``."""
        raise TypeError(f"this rule refines an action, and {type(self).__name__} has nothing that does")


class DisplacementPolicy(FlowPolicy):
    """π(s) = clip(a + δ(s, a)) for the flow's action a (FiDec, DeFlow)."""

    actor_kind = "displacement"
    refines = True

    def displacement(self, obs: Tensor, action: Tensor) -> Tensor:
        """δ(s, a), (..., d), not clipped."""
        return self.actor(torch.cat([self.view("actor", obs), action], dim=-1))

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.refine(obs, self.flow_action(obs, noise))

    @torch.no_grad()
    def refine(self, obs: Tensor, action: Tensor) -> Tensor:
        """clip(a + δ(s, a))."""
        return (action + self.displacement(obs, action)).clamp(-1, 1)


class OneStepPolicy(FlowPolicy):
    """π(s) = clip(μ(s, noise)), without the flow (FQL)."""

    actor_kind = "one-step"

    def one_step(self, obs: Tensor, noise: Tensor) -> Tensor:
        """μ(s, noise), (..., d), not clipped."""
        return self.actor(torch.cat([self.view("actor", obs), noise], dim=-1))

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self.one_step(obs, noise).clamp(-1, 1)


KINDS: dict[str, type[FlowPolicy]] = {kind.actor_kind: kind for kind in (DisplacementPolicy, OneStepPolicy)}


def check_float32(op: str, network: FlowPolicy) -> None:
    """Refuse networks that are not, or not all, in float32, the dtype of files."""
    for name, tensor in network.acting_weights().items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{op}: policy must be in float32, got {name} in {tensor.dtype}")
