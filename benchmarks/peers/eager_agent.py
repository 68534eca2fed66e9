"""FiDec, DeFlow and FQL in plain PyTorch, in the style of CleanRL, CORL and TorchRL's examples.

It uses separate modules, concatenates the inputs at every step, runs the two critics one after the other, forms the d×d
Fisher matrix, sums the losses and has one Adam. The replay buffer is CORL's: tensors on the device, indices drawn by
NumPy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from train.agents.hyperparameters import AgentConfig

Tensors = dict[str, Tensor]


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.GELU(approximate="tanh")]
        if layer_norm:
            layers.append(nn.LayerNorm(width, eps=1e-6))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def frozen(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module with its parameters held constant, as TorchRL's losses hold the critics."""
    constants = {name: p.detach() for name, p in module.named_parameters()}
    return lambda x: functional_call(module, constants, (x,))


class EagerAgent(nn.Module):
    """``name`` is fidec, deflow or fql. Call `make_optimizer` before the first update."""

    def __init__(self, name: str, config: AgentConfig, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.name, self.config, self.action_dim = name, config, action_dim
        self.flow = mlp(obs_dim + action_dim + 1, config.actor_hidden, action_dim, config.actor_layer_norm)
        self.actor = mlp(obs_dim + action_dim, config.actor_hidden, action_dim, config.actor_layer_norm)
        self.critics = nn.ModuleList(
            mlp(obs_dim + action_dim, config.critic_hidden, 1, config.critic_layer_norm) for _ in range(2)
        )
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        if name != "fql":
            self.log_alpha = nn.Parameter(torch.tensor(float(config.alpha)).log())

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.config.lr)

    def update(self, batch: Tensors, draws: Tensors) -> Tensors:
        """Make one update; returns the losses."""
        losses = self.losses(batch, draws)
        self.optimizer.zero_grad()
        losses["total_loss"].backward()
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.grad_clip)
        with torch.no_grad():  # as in the published agents, the target follows the critic from before this step
            for target, source in zip(self.target_critics.parameters(), self.critics.parameters()):
                target.mul_(1 - self.config.tau).add_(self.config.tau * source)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, batch: Tensors, draws: Tensors) -> Tensors:
        critic = self.critic_loss(batch, draws)
        flow = self.flow_loss(batch, draws)
        actor, penalty = self.actor_loss(batch, draws)
        total = critic + flow + actor
        return {
            "critic_loss": critic, "flow_loss": flow, "actor_loss": actor, "penalty": penalty, "total_loss": total
        }  # fmt: skip

    def critic_loss(self, batch: Tensors, draws: Tensors) -> Tensor:
        with torch.no_grad():
            next_actions = self.act(batch["next_observations"], draws["next_noise"])
            next_q1, next_q2 = self.q(self.target_critics, batch["next_observations"], next_actions)
            next_q = torch.min(next_q1, next_q2) if self.config.q_aggregation == "min" else (next_q1 + next_q2) / 2
            target_q = batch["rewards"] + self.config.discount * batch["masks"] * next_q
        q1, q2 = self.q(self.critics, batch["observations"], batch["actions"])
        return (F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)) / 2

    def flow_loss(self, batch: Tensors, draws: Tensors) -> Tensor:
        t = draws["flow_t"]
        x_t = (1 - t) * draws["flow_x0"] + t * batch["actions"]
        predicted = self.velocity(batch["observations"], x_t, t)
        return F.mse_loss(predicted, batch["actions"] - draws["flow_x0"])

    def actor_loss(self, batch: Tensors, draws: Tensors) -> tuple[Tensor, Tensor]:
        config, obs = self.config, batch["observations"]
        base_actions = self.flow_action(obs, draws["base_noise"])
        if self.name == "fql":
            actions = self.actor(torch.cat([obs, draws["base_noise"]], dim=-1))
            penalty = F.mse_loss(actions, base_actions)
        else:
            displacement = self.actor(torch.cat([obs, base_actions], dim=-1))
            actions = base_actions + displacement
            penalty = self.penalty(obs, displacement, draws)
        q1, q2 = self.q([frozen(critic) for critic in self.critics], obs, actions.clamp(-1, 1))
        q = (q1 + q2) / 2
        q_loss = -q.mean()
        if config.normalize_q:
            q_loss = q_loss / q.abs().mean().detach()
        if self.name == "fql":
            return config.alpha * penalty + q_loss, penalty
        alpha_loss = -self.log_alpha * (penalty.detach() - config.target_divergence)
        return self.log_alpha.exp().detach() * penalty + q_loss + alpha_loss, penalty

    def penalty(self, obs: Tensor, displacement: Tensor, draws: Tensors) -> Tensor:
        if self.name == "deflow":
            return displacement.square().mean()
        config, d = self.config, self.action_dim
        batch, num_samples, _ = draws["fisher_noise"].shape
        with torch.no_grad():
            obs = obs.repeat_interleave(num_samples, dim=0)
            samples = self.flow_action(obs, draws["fisher_noise"].reshape(-1, d))
            t = torch.full_like(samples[:, :1], config.fisher_t)
            x_t = (1 - t) * draws["bridge_noise"].reshape(-1, d) + t * samples
            v_t = self.velocity(obs, x_t, t)
            numerator = v_t if config.score_convention == "velocity" else t * v_t - x_t
            score = (numerator / (1 - t).clamp(min=config.min_sigma)).view(batch, num_samples, d)
            fisher = (score.unsqueeze(-1) * score.unsqueeze(-2)).mean(dim=1)
            fisher = fisher + config.fisher_damping * torch.eye(d, dtype=score.dtype, device=score.device)
            trace = fisher.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=config.fisher_trace_eps)
            fisher = fisher / trace[:, None, None]
        return (torch.einsum("bi,bij,bj->b", displacement, fisher, displacement) / d).mean()

    def q(self, critics: Iterable[Callable[[Tensor], Tensor]], obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        q1, q2 = (critic(torch.cat([obs, actions], dim=-1)).squeeze(-1) for critic in critics)
        return q1, q2

    def velocity(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.flow(torch.cat([obs, x, t], dim=-1))

    @torch.no_grad()
    def flow_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        actions, steps = noise, self.config.flow_steps
        for i in range(steps):
            t = torch.full_like(actions[..., :1], i / steps)
            actions = actions + self.velocity(obs, actions, t) / steps
        return actions.clamp(-1, 1)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        if self.name == "fql":
            return self.actor(torch.cat([obs, noise], dim=-1)).clamp(-1, 1)
        actions = self.flow_action(obs, noise)
        return (actions + self.actor(torch.cat([obs, actions], dim=-1))).clamp(-1, 1)

    def draw(self, batch_size: int, device: torch.device) -> Tensors:
        """The random numbers of one update."""
        shape = (batch_size, self.action_dim)
        draws = {name: torch.randn(shape, device=device) for name in ("next_noise", "flow_x0", "base_noise")}
        draws["flow_t"] = torch.rand(batch_size, 1, device=device)
        if self.name == "fidec":
            shape = (batch_size, self.config.num_fisher_samples, self.action_dim)
            draws |= {name: torch.randn(shape, device=device) for name in ("fisher_noise", "bridge_noise")}
        return draws


class ReplayBuffer:
    """Transitions as tensors on the device, sampled as CORL does."""

    def __init__(self, columns: Tensors) -> None:
        self.columns, self.size = columns, len(columns["rewards"])

    def sample(self, batch_size: int) -> Tensors:
        indices = np.random.randint(0, self.size, size=batch_size)  # noqa: NPY002 (as it is written there)
        return {name: column[indices] for name, column in self.columns.items()}
