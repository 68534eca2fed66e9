"""Refine a robot's flow policy over action chunks against a learned reward, inside a Fisher trust region.

    python -m examples.robot_chunks

The policy is built as LeRobot builds pi0: time runs from noise at t = 1 to data at t = 0, with x_t = t·noise +
(1 − t)·chunk; a transformer is trained to u = noise − chunk, and sampling takes Euler steps backwards.
docs/examples/robot_chunks.md has the diff.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fdkernels
from benchmarks.evidence.densities import Gaussian, observe
from examples.closed_form import OBS, Problem, Verdict, compare, judge, offline_data

HORIZON, ACT = 8, 2
PENALTIES = ("square", "fisher")


@dataclasses.dataclass
class Config:
    penalty: str = "fisher"
    """Of the displacement: square or fisher."""
    alpha: float = 100.0
    """Its weight, which means the same for both."""
    width: int = 64
    batch: int = 128
    flow_updates: int = 2_000
    reward_updates: int = 500
    refine_updates: int = 300
    states: int = 1_024
    """For these, chunks of the flow are sampled once; the refinement reads them."""


class Demonstrations(Gaussian):
    """Smooth chunks: a Gaussian process along the horizon, whose jitter is a quarter as wide as the process."""

    def __init__(self) -> None:
        steps = torch.arange(HORIZON, dtype=torch.float64)
        smooth = 0.2**2 * torch.exp(-0.5 * ((steps[:, None] - steps) / 3) ** 2)
        covariance = torch.kron(smooth + 0.05**2 * torch.eye(HORIZON), torch.eye(ACT, dtype=torch.float64))
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.d, self.ramp = HORIZON * ACT, 0.3 * torch.linspace(0, 1, HORIZON)

    def parts(self, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arm heads for the target, which lies in the state's direction."""
        mean = (self.ramp.to(angle).unsqueeze(-1) * observe(angle).unsqueeze(1)).flatten(1)
        n = len(angle)
        return mean, self.axes.to(angle).expand(n, -1, -1), self.variances.sqrt().to(angle).expand(n, -1)


# The reward asks for the last action only.
REACH = Problem(Demonstrations(), torch.cat([torch.zeros((HORIZON - 1) * ACT), torch.full((ACT,), ACT**-0.5)]))


class Velocity(nn.Module):
    """u(x_t, t, state): a transformer over one token for the state and one for each action of the chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(width // 16) * math.pi / 2)
        self.action_in, self.state_in, self.action_out = (
            nn.Linear(ACT, width),
            nn.Linear(OBS, width),
            nn.Linear(width, ACT),
        )
        self.action_time = nn.Sequential(nn.Linear(width + width // 8, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(0.1 * torch.randn(HORIZON + 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """x (n, HORIZON, ACT), t (n, 1, 1) and state (n, OBS) to (n, HORIZON, ACT)."""
        phase = t * self.frequencies
        time = torch.cat([phase.sin(), phase.cos()], -1).expand(-1, HORIZON, -1)
        tokens = self.action_time(torch.cat([self.action_in(x), time], -1))
        tokens = torch.cat([self.state_in(state).unsqueeze(1), tokens], 1) + self.position
        return self.action_out(self.layers(tokens)[:, 1:])

    def loss(self, chunk: Tensor, state: Tensor) -> Tensor:
        noise, t = torch.randn_like(chunk), torch.rand(len(chunk), 1, 1)
        return F.mse_loss(self(t * noise + (1 - t) * chunk, t, state), noise - chunk)


class Refinement(nn.Module):
    """A displacement of the flow's chunks that climbs a learned reward."""

    def __init__(self, flow: Velocity, reward: nn.Module, config: Config) -> None:
        super().__init__()
        self.flow, self.reward, self.config = flow.requires_grad_(False), reward.requires_grad_(False), config
        self.net = nn.Sequential(nn.Linear(OBS + HORIZON * ACT, 64), nn.SiLU(), nn.Linear(64, HORIZON * ACT))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def displacement(self, state: Tensor, chunk: Tensor) -> Tensor:
        return self.net(torch.cat([state, chunk.flatten(1)], -1)).view_as(chunk)

    def forward(self, state: Tensor, chunk: Tensor, samples: Tensor) -> Tensor:
        """The loss for states (n, OBS), a chunk of the flow for each, and K more, (n, K, HORIZON, ACT)."""
        delta = self.displacement(state, chunk)
        if self.config.penalty == "fisher":
            penalty = fdkernels.flow_fisher_penalty(
                self.flow, state, delta, samples=samples, t=0.1, path="linear_reversed", event_dim=2
            )
        else:
            penalty = delta.square().mean((-2, -1))
        reward = self.reward(torch.cat([state, (chunk + delta).flatten(1)], -1)).squeeze(-1)
        return (self.config.alpha * penalty - reward).mean()


def sample(flow: Velocity, noise: Tensor, state: Tensor) -> Tensor:
    """Chunks (..., HORIZON, ACT): ten Euler steps from t = 1 to 0."""
    return fdkernels.integrate_flow(flow, noise, state, path="linear_reversed", event_dim=2)


def minimise(loss: Callable[[], Tensor], module: nn.Module, updates: int, lr: float = 2e-3) -> None:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def learn_reward(state: Tensor, action: Tensor, reward: Tensor, config: Config) -> nn.Module:
    net = nn.Sequential(nn.Linear(OBS + HORIZON * ACT, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def loss() -> Tensor:
        rows = torch.randint(len(state), (config.batch,))
        return F.mse_loss(net(torch.cat([state[rows], action[rows]], -1)).squeeze(-1), reward[rows])

    minimise(loss, net, config.reward_updates)
    return net


def experiment(seed: int, config: Config) -> dict[str, Verdict]:
    """How far each penalty lets the chunks go, from the same flow and with the same reward."""
    torch.manual_seed(seed)
    state, action, reward = offline_data(20_000, REACH)
    chunk, flow = action.unflatten(1, (HORIZON, ACT)), Velocity(config.width)

    def flow_loss() -> Tensor:
        rows = torch.randint(len(state), (config.batch,))
        return flow.loss(chunk[rows], state[rows])

    minimise(flow_loss, flow, config.flow_updates)
    learned = learn_reward(state, action, reward, config)

    state = state[: config.states]
    noise = torch.randn(config.states, 5, HORIZON, ACT)
    chunks = sample(flow, noise, state.unsqueeze(1))

    def chunk_of(noise: Tensor, state: Tensor) -> Tensor:
        return sample(flow, noise.unflatten(1, (HORIZON, ACT)), state)

    verdicts = {"flow": judge(lambda noise, state: chunk_of(noise, state).flatten(1), None, REACH, states=32)}
    for penalty in PENALTIES:
        torch.manual_seed(seed)
        refinement = Refinement(flow, learned, dataclasses.replace(config, penalty=penalty))

        def refine_loss(refinement: Refinement = refinement) -> Tensor:
            rows = torch.randint(len(state), (config.batch // 2,))
            return refinement(state[rows], chunks[rows, 0], chunks[rows, 1:])

        def policy(noise: Tensor, state: Tensor, refinement: Refinement = refinement) -> Tensor:
            chunk = chunk_of(noise, state)
            return (chunk + refinement.displacement(state, chunk)).flatten(1)

        minimise(refine_loss, refinement, config.refine_updates, 5e-3)
        verdicts[penalty] = judge(policy, verdicts["flow"], REACH, states=32)
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--alpha", type=float, default=Config.alpha)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    compare(lambda seed: experiment(seed, Config(alpha=given.alpha)), given.seeds)
