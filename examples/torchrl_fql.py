"""Flow Q-learning as TorchRL writes it, with the distillation measured by the Fisher metric.

    python -m examples.torchrl_fql            # needs TorchRL: pip install -e '.[examples]'

TorchRL 0.14.1 has no flow policy and no FQL loss; its development version has both. The loss below has the same parts
and names, from TorchRL's own LossModule, MLP, ValueOperator and SoftUpdate. docs/examples/torchrl_fql.md
has the diff.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

import fdkernels
from examples.closed_form import OBS, TURNING, Verdict, compare, judge, offline_data

ACT = TURNING.behaviour.d
PENALTIES = ("square", "fisher", "pullback")


@dataclasses.dataclass
class Config:
    penalty: str = "fisher"
    """Of the distillation: square, as TorchRL has it, fisher or pullback."""
    alpha: float = 30.0
    """Weight of the distillation. It means the same for all three: each penalty is a mean square."""
    width: int = 64
    batch: int = 256
    flow_updates: int = 4_000
    critic_updates: int = 500
    actor_updates: int = 500
    lr: float = 3e-3


class FlowPolicy(nn.Module):
    """The behaviour: a velocity over cat[obs, action, time], integrated by Euler's method."""

    def __init__(self, net: nn.Module, num_steps: int = 10) -> None:
        super().__init__()
        self.net, self.num_steps = net, num_steps

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action, time], -1))

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        action = noise
        for step in range(self.num_steps):
            time = torch.full_like(action[..., :1], step / self.num_steps)
            action = action + self.velocity(observation, action, time) / self.num_steps
        return action.clamp(-1, 1)


class OneStepPolicy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        return self.net(torch.cat([observation, noise], -1))


class FQLLoss(LossModule):
    """Three losses of a batch: the flow's, the one-step policy's and the critics'."""

    flow_policy: FlowPolicy
    actor_network: OneStepPolicy
    qvalue_network: TensorDictModule
    flow_policy_params: TensorDictParams
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_flow_policy_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(self, flow: FlowPolicy, one_step: OneStepPolicy, critic: TensorDictModule, config: Config) -> None:
        super().__init__()
        self.convert_to_functional(flow, "flow_policy")
        self.convert_to_functional(one_step, "actor_network")
        self.convert_to_functional(critic, "qvalue_network", expand_dim=2, create_target_params=True)
        self.alpha, self.penalty, self.gamma = config.alpha, config.penalty, 0.99
        with self.flow_policy_params.to_module(self.flow_policy):
            self.velocity = fdkernels.pack_mlp(self.flow_policy.net, order=("cond", "x", "t"))

    def forward(self, td: TensorDict) -> TensorDict:
        losses = {"loss_flow": self.flow_loss(td), "loss_actor": self.actor_loss(td), "loss_qvalue": self.q_loss(td)}
        return TensorDict(losses)

    def flow_loss(self, td: TensorDict) -> Tensor:
        action = td["action"]
        noise, time = torch.randn_like(action), torch.rand_like(action[..., :1])
        with self.flow_policy_params.to_module(self.flow_policy):
            velocity = self.flow_policy.velocity(td["observation"], (1 - time) * noise + time * action, time)
        return (velocity - (action - noise)).square().mean()

    def actor_loss(self, td: TensorDict) -> Tensor:
        observation, noise = td["observation"], torch.randn_like(td["action"])
        with torch.no_grad(), self.flow_policy_params.to_module(self.flow_policy):
            target = self.flow_policy(observation, noise)
        with self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network(observation, noise)
        distillation = self.distillation(observation, action, target)
        q = self.qvalues(observation, action.clamp(-1, 1), self.qvalue_network_params.detach()).mean(0)
        return (self.alpha * distillation - q).mean()

    def distillation(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """The size of action − target, a mean square over the d coordinates or what takes its place, (B,)."""
        with self.flow_policy_params.to_module(self.flow_policy):
            if self.penalty == "fisher":
                return fdkernels.flow_fisher_penalty(self.velocity, observation, action - target, t=0.9)
            if self.penalty == "pullback":
                return fdkernels.flow_pullback_penalty(self.velocity, observation, target, action - target)
        return (action - target).square().mean(-1)

    def q_loss(self, td: TensorDict) -> Tensor:
        observation, reward, terminated = (td["next", name] for name in ("observation", "reward", "terminated"))
        with torch.no_grad(), self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network(observation, torch.randn_like(td["action"])).clamp(-1, 1)
            next_q = self.qvalues(observation, action, self.target_qvalue_network_params).mean(0)
            target = reward.squeeze(-1) + self.gamma * ~terminated.squeeze(-1) * next_q
        q = self.qvalues(td["observation"], td["action"], self.qvalue_network_params)
        return (q - target).square().mean()

    def qvalues(self, observation: Tensor, action: Tensor, params: TensorDict) -> Tensor:
        """Q of both critics, (2, B)."""
        td = TensorDict({"observation": observation, "action": action}, observation.shape[:-1])

        def one(params: TensorDict) -> Tensor:
            with params.to_module(self.qvalue_network):
                return self.qvalue_network(td.copy())["state_action_value"].squeeze(-1)

        return torch.vmap(one)(params)


def make_loss(config: Config) -> FQLLoss:
    def network(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, num_cells=[config.width] * 3, activation_class=nn.GELU)

    flow, one_step = FlowPolicy(network(OBS + ACT + 1, ACT)), OneStepPolicy(network(OBS + ACT, ACT))
    critic = ValueOperator(network(OBS + ACT, 1), in_keys=["observation", "action"])
    return FQLLoss(flow, one_step, critic, config)


def make_data(count: int) -> TensorDict:
    """Episodes of one step."""
    observation, action, reward = offline_data(count)
    done = torch.ones(count, 1, dtype=torch.bool)
    following = {"observation": observation, "reward": reward.unsqueeze(-1), "done": done, "terminated": done}
    return TensorDict({"observation": observation, "action": action, "next": following}, [count])


def minimise(
    loss: Callable[[TensorDict], Tensor],
    weights: Iterator[Tensor],
    data: TensorDict,
    updates: int,
    config: Config,
    after: Callable[[], None] = lambda: None,
) -> None:
    optimizer = torch.optim.Adam(list(weights), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch = data[torch.randint(len(data), (config.batch,))]
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()
        after()


def experiment(seed: int, config: Config) -> dict[str, Verdict]:
    """How far each penalty lets the one-step policy go, from the same flow, critics and first weights."""
    torch.manual_seed(seed)
    data, loss = make_data(20_000), make_loss(config)
    target = SoftUpdate(loss, tau=0.005)
    minimise(loss.flow_loss, loss.flow_policy_params.parameters(), data, config.flow_updates, config)
    critics = loss.qvalue_network_params.parameters()
    minimise(loss.q_loss, critics, data, config.critic_updates, config, target.step)
    with loss.flow_policy_params.to_module(loss.flow_policy):
        flow = judge(lambda noise, obs: loss.flow_policy(obs, noise))
    verdicts, start = {"flow": flow}, loss.actor_network_params.data.clone()
    for loss.penalty in PENALTIES:
        loss.actor_network_params.data.update_(start)
        minimise(loss.actor_loss, loss.actor_network_params.parameters(), data, config.actor_updates, config)
        with loss.actor_network_params.to_module(loss.actor_network):
            verdicts[loss.penalty] = judge(lambda noise, obs: loss.actor_network(obs, noise).clamp(-1, 1), flow)
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--alpha", type=float, default=Config.alpha)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    compare(lambda seed: experiment(seed, Config(alpha=given.alpha)), given.seeds)
