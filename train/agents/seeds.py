"""Several agents that differ only in their seed, trained side by side with batched weights.

Every parameter is stacked on a leading axis of N. Each agent's parameters are views of the stack, so evaluating,
saving or restoring an agent reads and writes the weights being trained. An update is the single agent's
(`train.agents.base.Learner`) with its losses under ``torch.func.vmap``, which makes each linear layer one grouped
product. The seeds stay independent: gradients of one seed's loss reach only that seed's weights, Adam is elementwise,
and gradients are clipped by each seed's own norm. On CUDA one call integrates the flows of all seeds. The CPU
integrates them one after another, and on processors where that is faster it computes the losses one by one too.

A seed whose numbers went wrong can be left out. It stays in the arithmetic, because a smaller stack would round
differently for the others, but its parameters no longer move, and its target network comes to a rest on them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fdkernels.cpu import layers as cpu_layers
from train import processes
from train.agents.base import ALL_PARTS, Agent, Draws, Learner, Parts
from train.data.replay import Replay
from train.data.transitions import Batch, OfflineDataset


class SeedGroup(Learner):
    """N agents of one class and configuration, on one device; their parameters become views of the stack."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        super().__init__()
        self.agents = list(agents)  # a list, to keep their parameters out of this module's own
        first = self.agents[0]
        self.config = first.config
        stacked = copy.deepcopy(first)
        for parameters in zip(stacked.parameters(), *(agent.parameters() for agent in self.agents)):
            whole, *single = parameters
            whole.data = torch.stack([p.data for p in single])
            for i, p in enumerate(single):
                p.data = whole.data[i]
        # named as in an agent, because functional_call and the update look them up by name
        for name, module in stacked.named_children():
            self.add_module(name, module)
        for name, parameter in stacked.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.left_out: set[int] = set()
        """Agents that no longer learn."""

    def optimizer_of(self, i: int, optimizer: torch.optim.Adam) -> torch.optim.Adam:
        """The optimiser of agent i, for its checkpoints; its state is a view of the state of the group's ``optimizer``.

        All agents share Adam's step count.
        """
        own = self.agents[i].make_optimizer()
        learning = [p for p in self.parameters() if p.requires_grad]
        for mine, whole in zip(own.param_groups[0]["params"], learning, strict=True):
            state = optimizer.state[whole]
            own.state[mine] = {name: tensor[i] if tensor.ndim else tensor for name, tensor in state.items()}
        return own

    @torch.no_grad()
    def leave_out(self, i: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep agent i's parameters as they are from here on, the update whose gradients are at hand included."""
        self.left_out.add(i)
        for p in self.parameters():
            for moment in optimizer.state.get(p, {}).values():
                if moment.ndim:  # Adam's step count is everybody's
                    moment[i] = 0
        self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        """Without gradient and momentum, Adam moves nothing."""
        for i in self.left_out:
            for gradient in self.gradients_of(i).values():
                gradient.zero_()

    def agent_parts(self, updates: int) -> Parts:
        return self.agents[0].agent_parts(updates)

    def backward(self, batch: Batch, draws: Draws, parts: Parts = ALL_PARTS, *, log: bool = False) -> dict[str, Tensor]:
        seen = super().backward(batch, draws, parts, log=log)
        self._silence()
        return seen

    def encode(self, batch: Batch, draws: Draws, parts: Parts) -> Batch:
        """The images of one seed after the other, each by its own encoders."""
        if not self.encoders:
            return batch
        encoding = _Call(self.agents[0], "encode")
        parameters: dict[str, Tensor] = {f"agent.encoders.{name}": p for name, p in self.encoders.named_parameters()}
        of_each = zip(*(_unbound(tensors, len(self.agents)) for tensors in (parameters, _given(batch), _given(draws))))
        encoded = [
            functional_call(encoding, own, (Batch(**rows), Draws(**drawn), parts)) for own, rows, drawn in of_each
        ]
        return batch._replace(
            observations=torch.stack([of_one.observations for of_one in encoded]),
            next_observations=torch.stack([of_one.next_observations for of_one in encoded]),
        )

    def integrate(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, Tensor]:
        if self.flow.net[0].weight.is_cuda:
            return self.integrate_together(batch, draws, parts)
        flows = [
            agent.integrate(Batch(**_of(i, batch)), Draws(**_of(i, draws)), parts)
            for i, agent in enumerate(self.agents)
        ]
        return {name: torch.stack([of_agent[name] for of_agent in flows]) for name in flows[0]}

    def integrate_together(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, Tensor]:
        agent = _Call(self.agents[0], "integrate")

        def flows(
            parameters: dict[str, Tensor], batch: dict[str, Tensor], draws: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            return functional_call(agent, parameters, (Batch(**batch), Draws(**draws), parts))

        parameters: dict[str, Tensor] = {f"agent.{name}": p for name, p in self.named_parameters()}
        return vmap(flows)(parameters, _given(batch), _given(draws))

    def forward(
        self, batch: Batch, draws: Draws, flows: dict[str, Tensor], parts: Parts, log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses (N,), and the intermediate tensors with N as their first dimension."""

        def losses(
            parameters: dict[str, Tensor], batch: dict[str, Tensor], draws: dict[str, Tensor], flows: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            arguments = (Batch(**batch), Draws(**draws), flows, parts, log)
            return functional_call(self.agents[0], parameters, arguments)

        parameters: dict[str, Tensor] = dict(self.named_parameters())
        given = _given(batch), _given(draws), flows
        # Several processes sum over all of them in the forward pass, and must do so equally often.
        if processes.place().total > 1 or not cpu_layers.multiplies_apart(batch.observations):
            return vmap(losses)(parameters, *given)
        of_each = zip(*(_unbound(tensors, len(self.agents)) for tensors in (parameters, *given)))
        totals, seen = zip(*(losses(*of_one) for of_one in of_each))
        return torch.stack(totals), {name: torch.stack([of_one[name] for of_one in seen]) for name in seen[0]}

    def sample(
        self, dataset: OfflineDataset | Replay, batch_size: int, generators: Sequence[torch.Generator]
    ) -> tuple[Batch, Draws]:
        indices, draws = [], []
        rows = processes.own_rows(batch_size)
        for agent, generator in zip(self.agents, generators, strict=True):
            indices.append(dataset.draw(batch_size, generator)[rows])
            draws.append(agent.draw(batch_size, generator).of_rows(rows))
        stacked = (None if column[0] is None else torch.stack(column) for column in zip(*draws))
        return dataset.take(torch.stack(indices)), Draws(*stacked)  # type: ignore[arg-type]

    def figures(self, batch: Batch, seen: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Nothing for agents that are left out: their numbers may be such that no figure can be made of them."""
        return [
            agent.metrics(Batch(**_of(i, batch)), {name: tensor[i] for name, tensor in seen.items()})
            if i not in self.left_out
            else {}
            for i, agent in enumerate(self.agents)
        ]

    def gradient_norms(self) -> Tensor:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        return torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]).norm(dim=0)

    def clip_gradients(self, bound: float, norms: Tensor) -> None:
        scale = (bound / (norms + 1e-6)).clamp(max=1)
        for g in (p.grad for p in self.parameters() if p.grad is not None):
            g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))

    def share(self, i: int, batch: Batch, draws: Draws) -> tuple[Batch, Draws]:
        return Batch(**_of(i, batch)), Draws(**_of(i, draws))

    def gradients_of(self, i: int) -> dict[str, Tensor]:
        return {name: p.grad[i] for name, p in self.named_parameters() if p.grad is not None}


class _Call(nn.Module):
    """A method of an agent as a forward pass, so that ``functional_call`` can replace its parameters."""

    def __init__(self, agent: Agent, method: Literal["encode", "integrate"]) -> None:
        super().__init__()
        self.agent, self.method = agent, method

    def forward(self, batch: Batch, draws: Draws, parts: Parts) -> Any:
        return getattr(self.agent, self.method)(batch, draws, parts)


def _given(columns: Batch | Draws) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in columns._asdict().items() if tensor is not None}


def _unbound(tensors: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """Each agent's slices. All are unbound at once, so that their gradients are stacked once, not agent by agent."""
    columns = {name: tensor.unbind() for name, tensor in tensors.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(n)]


def _of(i: int, columns: Batch | Draws) -> dict[str, Tensor]:
    return {name: tensor[i] for name, tensor in _given(columns).items()}
