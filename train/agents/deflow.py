"""The isotropic counterpart of FiDec: the trust region is ‖δ‖²/d ≤ target."""

from __future__ import annotations

from torch import Tensor

from train.agents.base import Draws
from train.agents.decorator import DecoratorAgent


class DeFlow(DecoratorAgent):
    """The isotropic trust region: the size of δ is ‖δ‖²/d."""

    title = "DeFlow"
    summary = "isotropic trust region"

    def penalty(
        self, obs: Tensor, displacement: Tensor, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return displacement.square().mean(-1), {}
