"""The drop-ins of ``examples/`` at toy size, each as a module that maps rows of data to its loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

ROWS = 8
NAMES = ("torchrl_fql", "reinflow", "robot_chunks", "corl")
CASES = [
    *((name, penalty) for name in ("torchrl_fql", "reinflow", "corl") for penalty in ("fisher", "pullback")),
    ("robot_chunks", "fisher"),
]
SLOW = pytest.mark.long("imports TorchRL, which takes seconds")


def named(names: Iterable[str]) -> list[Any]:
    """The scripts as parameters, those that import TorchRL marked long."""
    return [pytest.param(name, marks=SLOW if name == "torchrl_fql" else ()) for name in names]


each_drop_in = pytest.mark.parametrize(
    ("name", "penalty"), [pytest.param(*case, marks=SLOW if case[0] == "torchrl_fql" else ()) for case in CASES]
)
DropIn = tuple[nn.Module, Callable[[slice], tuple[Any, ...]]]
"""The module, and its arguments for some of the rows."""


class Total(nn.Module):
    """The sum of an agent's losses."""

    def __init__(self, agent: nn.Module, losses: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.agent, self.losses = agent, losses

    def forward(self, batch: Any) -> Tensor:
        return torch.stack(self.losses(batch)).sum()


def script(name: str) -> Any:
    if name == "torchrl_fql":
        pytest.importorskip("torchrl", reason="the extra 'examples' is not installed")
    return importlib.import_module(f"examples.{name}")


def torchrl_fql(penalty: str) -> DropIn:
    module = script("torchrl_fql")
    loss, data = module.make_loss(module.Config(penalty=penalty, width=16)), module.make_data(ROWS)
    module.SoftUpdate(loss, tau=0.1)
    return Total(loss, lambda batch: list(loss(batch).values())), lambda rows: (data[rows],)


def reinflow(penalty: str) -> DropIn:
    module = script("reinflow")
    agent = module.ReinFlow(module.FlowMLP(16), module.Config(penalty=penalty))
    chains = module.collect(agent, ROWS)
    with torch.no_grad():  # away from the behaviour, where the penalty has a gradient
        for weight in agent.flow.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    by_row = {"states": 1}

    def some(rows: slice) -> tuple[Any, ...]:
        columns = {
            name: column[:, rows] if by_row.get(name) else column[rows] for name, column in chains._asdict().items()
        }
        return (module.Chains(**columns),)

    return agent, some


def robot_chunks(penalty: str) -> DropIn:
    module = script("robot_chunks")
    reward = nn.Sequential(nn.Linear(module.OBS + module.HORIZON * module.ACT, 8), nn.SiLU(), nn.Linear(8, 1))
    refinement = module.Refinement(module.Velocity(16), reward, module.Config(penalty=penalty))
    nn.init.normal_(refinement.net[-1].weight, std=0.05)
    state = torch.randn(ROWS, module.OBS)
    chunks = torch.randn(ROWS, 3, module.HORIZON, module.ACT)
    return refinement, lambda rows: (state[rows], chunks[rows, 0], chunks[rows, 1:])


def corl(penalty: str) -> DropIn:
    module = script("corl")
    agent, data = module.Agent(3, 2, module.Config(penalty=penalty, width=16)), module.Corridor()
    nn.init.normal_(agent.delta[-1].weight, std=0.05)
    batch, _, _ = data.rollouts(data.drive, 2)

    def losses(batch: Any) -> list[Tensor]:
        return [agent.flow_loss(batch), agent.critic_loss(batch), agent.actor_loss(batch.obs)]

    return Total(agent, losses), lambda rows: (module.Batch(*(column[:ROWS][rows] for column in batch)),)


def make(name: str, penalty: str) -> DropIn:
    """The same weights and data each time."""
    torch.manual_seed(0)
    return globals()[name](penalty)


def with_weights(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...]) -> Tensor:
    """The loss with other weights, by name: ``functional_call``, or TorchRL's own way for its losses."""
    if not hasattr(getattr(module, "agent", None), "flow_policy_params"):
        return functional_call(module, weights, args)
    from tensordict import TensorDict

    state = TensorDict.from_module(module.agent).data.clone(recurse=False)
    for name, weight in weights.items():
        state.set(tuple(name.removeprefix("agent.").split(".")), weight)
    with state.to_module(module.agent):
        return module(*args)


def gradients(module: nn.Module, loss: Callable[[], Tensor], seed: int = 1) -> tuple[float, Tensor]:
    """The loss, with noise of this seed, and the gradients of all weights in one row."""
    torch.manual_seed(seed)
    module.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.item(), flat([p.grad for p in module.parameters() if p.requires_grad])


def flat(tensors: list[Tensor | None]) -> Tensor:
    assert all(tensor is not None for tensor in tensors), "a weight without a gradient"
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])
