"""What the networks of a policy look like."""

from __future__ import annotations

import dataclasses
import typing

from fdkernels.networks import MAX_LAYERS, MAX_WIDTH
from fdkernels.policy.encoder import EncoderName
from fdkernels.validation import brief, check_choice, check_count, check_flag

MOST_STEPS = 10_000
"""Steps of a flow; with more, an action takes minutes."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The settings that decide what a policy computes; the others are of its training.

    Raises:
        TypeError, ValueError: a setting has the wrong type, or is out of its range.
    """

    actor_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the flow network and of the displacement (or one-step) network."""
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of both critics."""
    actor_layer_norm: bool = False
    """Layer norm in the flow and displacement networks."""
    critic_layer_norm: bool = True
    """Layer norm in the critics."""
    encoder: EncoderName = "none"
    """How images are read; environments with images set it. Each network has an encoder of its own, the two critics one
    together. none: observations are states."""
    frame_stack: int = 1
    """Frames that one observation of images consists of, the newest and those before it."""
    flow_steps: int = 10
    """Euler steps of the flow."""

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name in ("actor_hidden", "critic_hidden"):
            widths = getattr(self, name)
            if not isinstance(widths, tuple):
                raise TypeError(f"{op}: {name} must be a tuple of widths, got {brief(widths)}")
            if len(widths) > MAX_LAYERS:
                raise ValueError(f"{op}: {name} must have at most {MAX_LAYERS} layers, got {len(widths):,}")
            for width in widths:
                check_count(op, f"every width in {name}", width, most=MAX_WIDTH)
        for name in ("actor_layer_norm", "critic_layer_norm"):
            check_flag(op, name, getattr(self, name))
        check_choice(op, "encoder", self.encoder, typing.get_args(EncoderName))
        check_count(op, "frame_stack", self.frame_stack)
        check_count(op, "flow_steps", self.flow_steps, most=MOST_STEPS)
