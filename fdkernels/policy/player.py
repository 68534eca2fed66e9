"""A trained policy as a function from observations to actions."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fdkernels.policy.acting import REFINING_RULES, Acting, RuleName
from fdkernels.policy.finite import check_finite
from fdkernels.policy.network import FlowPolicy
from fdkernels.validation import brief, check_count

Observation = TypeVar("Observation", Tensor, np.ndarray)
LARGEST_SEED = 2**63 - 1


class Policy:
    """Maps one observation, or a batch of them, to actions. It draws its own noise, and remembers frames.

    The same seed and the same observations give the same actions. The noise comes from a generator on the network's
    device; each call draws on from the one before.

    Args:
        network: the trained networks, on any device. Their weights are used as they are at each call.
        acting: how it acts: a rule with its settings, or the rule's name.
        seed: of the noise.
        env: the name of the environment that it was trained in, if known.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or the rule refines actions and this network
            does not.
    """

    def __init__(
        self, network: FlowPolicy, acting: Acting | RuleName = "sample", *, seed: int = 0, env: str = ""
    ) -> None:
        if not isinstance(network, FlowPolicy):
            raise TypeError(f"Policy: network must be a FlowPolicy, got {type(network).__name__}")
        self.network = network
        self.acting = rule_with_settings(acting, Acting())
        if self.acting.rule in REFINING_RULES and not network.refines:
            raise ValueError(
                f"Policy: acting={self.acting.rule!r} refines an action, and a {network.actor_kind} policy has nothing "
                "that does"
            )
        self.env = env
        self._frames: deque[Tensor] = deque(maxlen=network.config.frame_stack)
        self.reset(seed)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """The shape of one observation: (c,) of a state, (height, width, channels) of one frame of images."""
        *shape, last = self.network.obs_mean.shape
        return (*shape, last // self.network.config.frame_stack)

    @property
    def action_dim(self) -> int:
        return self.network.action_dim

    def reset(self, seed: int | None = None) -> None:
        """Forget the frames of the episode before. With ``seed``, also draw the noise anew from it."""
        self._frames.clear()
        if seed is not None:
            seed = check_count("Policy", "seed", seed, least=0, most=LARGEST_SEED)
            self._generator = torch.Generator(self.network.obs_mean.device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, observation: Observation) -> Observation:
        """Act.

        A policy of several frames of images remembers those of the calls before (the first one stands for those
        before it), so call `reset` where an episode begins. If a batch has episodes that begin at different times, give
        it the frames stacked along the channels, the oldest first; they are then taken as they are.

        Args:
            observation: an array or a tensor, on any device, of one observation or of a batch (B, ...); of
                `observation_shape`, or with all frames. States are of any real dtype, and converted to the network's;
                images are uint8.

        Returns:
            The action (d,) or the actions (B, d), within [-1, 1], in the network's dtype; an array for an array, and
            for a tensor a tensor on its device. Where the environment's bounds are others, rescale.

        Raises:
            TypeError: the observation is neither, or of another dtype.
            ValueError: its shape does not fit the policy or the frames before it.
            NotFinite: it has NaN or infinity in the network's dtype, or the action or a critic's value would.
        """
        rows, single = self._rows(observation)
        noise = self.acting.draw(self.network, len(rows), self._generator)
        actions = self.acting(self.network, self.network.observe(self._stacked(rows)), noise)
        check_finite("the policy's action", actions)
        if single:
            actions = actions[0]
        return actions.cpu().numpy() if isinstance(observation, np.ndarray) else actions.to(observation.device)

    def _rows(self, observation: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        """The observations (B, ...) on the network's device, and whether it is a single one."""
        if not isinstance(observation, (Tensor, np.ndarray)):
            raise TypeError(f"Policy: observation must be an array or a tensor, got {type(observation).__name__}")
        mean = self.network.obs_mean
        if isinstance(observation, np.ndarray):
            if observation.dtype.kind not in "fiu":
                raise TypeError(f"Policy: observation must hold real numbers, got {observation.dtype}")
            observation = torch.from_numpy(np.array(observation))  # a copy, because it may not be writable
        images = mean.ndim > 1
        if images and observation.dtype != torch.uint8:
            raise TypeError(f"Policy: observation must be images in uint8, 0 to 255, got {observation.dtype}")
        if observation.is_complex() or observation.dtype == torch.bool:
            raise TypeError(f"Policy: observation must hold real numbers, got {observation.dtype}")
        frame, stacked = self.observation_shape, tuple(mean.shape)
        single = observation.ndim == mean.ndim
        rows = observation.unsqueeze(0) if single else observation
        if rows.ndim != mean.ndim + 1 or tuple(rows.shape[1:]) not in (frame, stacked):
            frames = "" if frame == stacked else f", or {stacked} with its {self.network.config.frame_stack} frames"
            raise ValueError(
                f"Policy: observation must be {frame}{frames}, or a batch of such observations, got "
                f"{tuple(observation.shape)}"
            )
        rows = rows.to(mean.device) if images else rows.to(mean)
        check_finite("the observation", rows[0] if single else rows)
        return rows, single

    def _stacked(self, rows: Tensor) -> Tensor:
        """The frames of the calls before and this one, oldest first; rows that have them all, as they are."""
        if rows.shape[1:] == self.network.obs_mean.shape:
            return rows
        if self._frames and self._frames[-1].shape != rows.shape:
            raise ValueError(
                f"Policy: observation has {len(rows)} rows, and the frame before had {len(self._frames[-1])}: call "
                "reset() where episodes begin"
            )
        rows = rows.clone()  # the caller may write the next frame into the same memory
        while len(self._frames) < self.network.config.frame_stack - 1:
            self._frames.append(rows)
        self._frames.append(rows)
        return torch.cat(list(self._frames), dim=-1)


def rule_with_settings(asked: Acting | RuleName | None, default: Acting) -> Acting:
    """The rule asked for, by its name with the settings of ``default``; ``default`` itself for None."""
    if asked is None or isinstance(asked, Acting):
        return asked or default
    if not isinstance(asked, str):
        raise TypeError(f"Policy: acting must be an Acting or the name of a rule, got {brief(asked)}")
    return dataclasses.replace(default, rule=asked)
