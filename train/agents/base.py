"""The code that all agents share: networks, critic, flow matching, optimiser, and the update.

An update has two halves. `Learner.backward` integrates the flow for the actions that the losses need, adds critic loss,
flow-matching loss and actor loss, and takes gradients. `Learner.step` clips them, moves the target network and steps
Adam. A run looks at the numbers in between.

An agent is a subclass of `Agent` in its own file. Its methods define how it learns and acts; its class attributes hold
what the rest of the project must know about it.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fdkernels
from fdkernels.policy import FlowPolicy
from fdkernels.policy.critic import TwinCritic
from fdkernels.policy.encoder import FEATURES
from fdkernels.policy.network import NETWORKS, NetworkName
from train import processes
from train.agents.augmentation import MOST_SHIFT, shifted
from train.agents.hyperparameters import AgentConfig
from train.agents.target import follow
from train.data.replay import Replay
from train.data.transitions import Batch, OfflineDataset

METRICS = {
    "flow_loss": "flow-matching loss",
    "critic_loss": "temporal-difference error",
    "actor_loss": "weighted penalty + Q term + multiplier's loss",
    "q_data": "mean Q of dataset actions",
    "q_policy": "mean Q of the policy's actions",
    "penalty": "size of the displacement in the trust region's metric (fql: distillation error)",
    "alpha": "multiplier of the penalty",
    "displacement_norm": "mean ‖δ‖",
    "displacement_mean_square": "mean ‖δ‖²/d",
    "top_eigenvalue_share": "share of the largest eigenvalue of the metric (isotropic: 1/d)",
    "fisher_trace_per_dim": "mean tr F / d, or of the metric in its place",
    "action_error": "mean squared difference of the policy's and the dataset's actions",
}


class Panel(NamedTuple):
    """One of the small plots below the scores in curve.png; the x axis counts updates."""

    title: str
    lines: Mapping[str, str]
    """Columns of metrics.csv and their names in the legend; at most three."""
    log_scale: bool = False
    target: str | None = None
    """A hyper-parameter to draw as the target."""


class Draws(NamedTuple):
    """All random numbers of one update. B is the batch size, d the action width, K the number of Fisher samples."""

    next_noise: Tensor
    """Noise for the policy's next action in the critic target, (B, d) normal."""
    flow_x0: Tensor
    """Noise end of the flow-matching path, (B, d) normal."""
    flow_t: Tensor
    """Time on the flow-matching path, (B, 1) uniform on [0, 1)."""
    base_noise: Tensor
    """Noise for the action that the actor improves, (B, d) normal."""
    fisher_noise: Tensor | None = None
    """Noise that the Fisher samples start from, (B, K, d) normal."""
    bridge_noise: Tensor | None = None
    """Noise that takes the Fisher samples back to time t, (B, K, d) normal."""
    fisher_t: Tensor | None = None
    """Time t of each Fisher sample, (B, K, 1); None if t is constant."""
    shift: Tensor | None = None
    """Rows and columns by which each image is moved, (B, 2) int64; None without augmentation."""

    def of_rows(self, rows: slice) -> Draws:
        """Those of some rows of the batch."""
        return Draws(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]


Part = Literal["critic", "data_critic", "flow", "frozen_flow", "actor"]
Parts = tuple[Part, ...]
ALL_PARTS: Parts = ("critic", "flow", "actor")


class Learner(nn.Module, abc.ABC):
    """The update of one agent, or of several side by side (``train/agents/seeds.py``).

    A call takes the results of `integrate`. It returns the sum of the losses in ``parts``, which `backward`
    differentiates, and the intermediate tensors that `Agent.metrics` reads. With ``log=False`` it returns no such
    tensors and computes nothing just for them.
    """

    config: AgentConfig
    flow: fdkernels.VelocityMLP
    critic: TwinCritic
    target_critic: TwinCritic
    encoders: nn.ModuleDict
    """Encoders of the `NETWORKS` and of the target critic; none for states."""
    losses: Tensor
    """The summed losses of the last `backward`: a scalar, or (N,) for N agents."""

    def make_optimizer(self) -> torch.optim.Adam:
        """One Adam for all trainable parameters. Call this once the module is on its device."""
        learning = [p for p in self.parameters() if p.requires_grad]
        on_gpu = learning[0].is_cuda
        # A captured update reads the learning rate and counts its steps on the device, and cannot create state.
        lr = torch.tensor(self.config.lr, device=learning[0].device) if on_gpu else self.config.lr
        optimizer = torch.optim.Adam(learning, lr=lr, fused=True, capturable=on_gpu)
        for p in learning:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
        return optimizer

    def agent_parts(self, updates: int) -> Parts:
        """The losses of the whole agent's next update, after ``updates`` of them."""
        flow_until, critic_until = self.config.freeze_flow_after, self.config.freeze_critic_after
        critic: Parts = ("critic",) if critic_until is None or updates < critic_until else ()
        flow: Parts = ("flow",) if flow_until is None or updates < flow_until else ("frozen_flow",)
        if flow_until == 0:  # the warm-up's momentum, at another learning rate, would damage the flow
            flow = ()
        return (*critic, *flow, "actor")

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        draws: Draws,
        parts: Parts = ALL_PARTS,
        *,
        log: bool = False,
    ) -> dict[str, Tensor]:
        """Make one update. With ``log``, returns the tensors that `Agent.metrics` reads."""
        seen = self.backward(batch, draws, parts, log=log)
        self.step(optimizer, parts)
        return seen

    def backward(self, batch: Batch, draws: Draws, parts: Parts = ALL_PARTS, *, log: bool = False) -> dict[str, Tensor]:
        """Write the gradients of the summed losses to ``.grad``. Returns the intermediate tensors, detached.

        If several processes have parts of the batch, the gradients are those of the whole, the tensors this part's.
        """
        self.zero_grad()
        batch = self.encode(batch, draws, parts)
        flows = self.integrate(batch, draws, parts)
        total_loss, seen = self(batch, draws, flows, parts, log)
        if processes.place().total == 1:
            total_loss.sum().backward()
            self.losses = total_loss.detach()
        else:
            rows = draws.base_noise.shape[-2]
            (total_loss.sum() * rows).backward()
            self.losses = total_loss.detach() * rows
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            processes.average([*gradients, self.losses], rows)
        if "frozen_flow" in parts:
            # As in the published code, the loss is gone but Adam's momentum still moves the flow a little.
            for p in (*self.flow.parameters(), *self.encoder_parameters("flow")):
                p.grad = torch.zeros_like(p)
        return {name: tensor.detach() for name, tensor in seen.items()}

    def step(self, optimizer: torch.optim.Optimizer, parts: Parts = ALL_PARTS, norms: Tensor | None = None) -> None:
        """Clip the gradients, move the target network if the critic learns, and step the optimiser.

        ``norms`` are the `gradient_norms`, if the caller has them already.
        """
        if self.config.grad_clip is not None:
            self.clip_gradients(self.config.grad_clip, self.gradient_norms() if norms is None else norms)
        if "critic" in parts or "data_critic" in parts:
            # As in the published code, the target follows the critic from before this step.
            follow(self.target_critic, self.critic, self.config.tau)
            if self.encoders:
                follow(self.encoders["target_critic"], self.encoders["critic"], self.config.tau)
        optimizer.step()

    def encoder_parameters(self, network: NetworkName) -> list[nn.Parameter]:
        """Parameters of a network's encoder; none for states."""
        return list(self.encoders[network].parameters()) if self.encoders else []

    @abc.abstractmethod
    def encode(self, batch: Batch, draws: Draws, parts: Parts) -> Batch:
        """The batch as the networks take it: its images moved and encoded, once for each network; states as they are.

        Encodings have a gradient if their network's own loss is among ``parts``.
        """

    @abc.abstractmethod
    def integrate(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, Tensor]:
        """Integrate the flow for all actions that an update needs, without gradient."""

    @abc.abstractmethod
    def sample(
        self, dataset: OfflineDataset | Replay, batch_size: int, generators: Sequence[torch.Generator]
    ) -> tuple[Batch, Draws]:
        """A batch and the random numbers of one update, drawn from one generator per agent.

        All are drawn, and those of this process's rows returned.
        """

    @abc.abstractmethod
    def figures(self, batch: Batch, seen: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """`Agent.metrics` of each agent."""

    @abc.abstractmethod
    def gradient_norms(self) -> Tensor:
        """The norm of each agent's gradients, over all its parameters together, in the shape of `losses`."""

    @abc.abstractmethod
    def clip_gradients(self, bound: float, norms: Tensor) -> None:
        """Scale gradients, whose `gradient_norms` are ``norms``, so that these are at most ``bound``."""

    @abc.abstractmethod
    def share(self, i: int, batch: Batch, draws: Draws) -> tuple[Batch, Draws]:
        """What `sample` drew for agent i."""

    @abc.abstractmethod
    def gradients_of(self, i: int) -> dict[str, Tensor]:
        """The gradients of agent i, by the names of its parameters."""


class Agent(Learner, FlowPolicy):
    """Base of all agents: a policy with losses.

    A new agent defines `next_actions`, `actor_loss`, and the attributes that differ. It also derives from a kind of
    policy of ``fdkernels/policy/network.py``, which says how it acts.
    """

    config: AgentConfig

    title: ClassVar[str]
    """Name in tables and pictures, such as "FQL"."""
    summary: ClassVar[str]
    """A few words about the agent for ``--help``."""
    hyperparameters: ClassVar[type[AgentConfig]] = AgentConfig
    """A subclass of `AgentConfig` if the agent has hyper-parameters of its own; they become flags of its runs."""
    published: ClassVar[Mapping[str, Any]] = {}
    """Hyper-parameters whose published values differ from the defaults of ``hyperparameters``."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """For each preset, the settings and hyper-parameters that this agent changes in it."""
    integrates_next: ClassVar[bool] = False
    """Whether its `starts` have next observations, which the flow must then encode too."""
    metric_names: ClassVar[Mapping[str, str]] = METRICS
    """Columns of metrics.csv and what they mean. An agent that logs more adds its own."""
    panels: ClassVar[tuple[Panel, Panel, Panel]] = (
        Panel("size of the displacement", {"penalty": "penalty"}, log_scale=True),
        Panel("mean Q", {"q_policy": "policy", "q_data": "dataset"}),
        Panel("action error", {"action_error": "policy − dataset, squared"}),
    )
    """The plots below the scores in curve.png."""
    q_scale_floor: ClassVar[float] = 0.0
    """Lower bound of the mean |Q| that `normalize_q` divides by."""

    @classmethod
    def published_config(cls, **changes: Any) -> AgentConfig:
        """The published hyper-parameters, except for ``changes``."""
        return cls.hyperparameters(**{**cls.published, **changes})

    @classmethod
    def flow_evaluations(cls, config: AgentConfig, action_dim: int) -> int:
        """Rows of the velocity network, per row of the batch, that one update costs without the flow's own loss."""
        return config.flow_steps

    def __init__(self, config: AgentConfig, observation: int | Sequence[int], action_dim: int) -> None:
        """``observation`` is the width of the states, or height, width and channels of the images."""
        super().__init__(config, observation, action_dim)
        if self.encoders:
            self.encoders["target_critic"] = copy.deepcopy(self.encoders["critic"]).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    @torch.no_grad()
    def center_critics(self, mean_reward: float) -> None:
        """Start both critics at r̄/(1 − γ), the value of earning the mean reward for ever."""
        for critic in (self.critic, self.target_critic):
            critic.biases[-1].fill_(mean_reward / (1 - self.config.discount))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Fresh random numbers for one update."""
        return Draws(
            next_noise=self._normal(generator, batch_size),
            flow_x0=self._normal(generator, batch_size),
            flow_t=torch.rand(batch_size, 1, generator=generator, **self._like()),
            base_noise=self._normal(generator, batch_size),
            shift=self._shift(batch_size, generator) if self.config.augment and self.encoders else None,
        )

    def _shift(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        """Offsets of a batch's images, or zeros: chosen on the device, so that it can be captured."""
        device, range_ = self.obs_mean.device, (-MOST_SHIFT, MOST_SHIFT + 1)
        chosen = torch.rand((), generator=generator, device=device) < self.config.augment
        return chosen * torch.randint(*range_, (batch_size, 2), generator=generator, device=device)

    def _like(self) -> dict[str, Any]:
        return {"dtype": self.obs_mean.dtype, "device": self.obs_mean.device}

    def _normal(self, generator: torch.Generator | None, *shape: int) -> Tensor:
        return torch.randn(*shape, self.action_dim, generator=generator, **self._like())

    def sample(
        self, dataset: OfflineDataset | Replay, batch_size: int, generators: Sequence[torch.Generator]
    ) -> tuple[Batch, Draws]:
        (generator,) = generators
        rows = processes.own_rows(batch_size)
        index, draws = dataset.draw(batch_size, generator), self.draw(batch_size, generator)
        return dataset.take(index[rows]), draws.of_rows(rows)

    def figures(self, batch: Batch, seen: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [self.metrics(batch, seen)]

    def gradient_norms(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def clip_gradients(self, bound: float, norms: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.parameters(), bound, norms)

    def share(self, i: int, batch: Batch, draws: Draws) -> tuple[Batch, Draws]:
        return batch, draws

    def gradients_of(self, i: int) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    # -- images --------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch, draws: Draws, parts: Parts) -> Batch:
        if not self.encoders:
            return batch
        images, next_images = batch.observations, batch.next_observations
        if draws.shift is not None:
            images, next_images = shifted(images, draws.shift), shifted(next_images, draws.shift)
        acts, aims = "actor" in parts, "critic" in parts
        learns = {"flow": "flow" in parts, "actor": acts, "critic": aims or "data_critic" in parts}
        ahead = {"flow": aims and self.integrates_next, "actor": aims, "critic": learns["critic"]}
        # An encoding that nobody should read is NaN, which would show in the loss.
        unread = torch.full((len(images), FEATURES), torch.nan, **self._like())
        encodings, next_encodings = [], []
        for name in NETWORKS:
            with torch.set_grad_enabled(learns[name]):
                encodings.append(self.encoders[name](images) if learns[name] or acts else unread)
            with torch.no_grad():
                following = self.encoders["target_critic" if name == "critic" else name]
                next_encodings.append(following(next_images) if ahead[name] else unread)
        return batch._replace(
            observations=torch.cat(encodings, dim=-1), next_observations=torch.cat(next_encodings, dim=-1)
        )

    # -- the losses ----------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, draws: Draws, flows: dict[str, Tensor], parts: Parts, log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses: list[Tensor] = []
        seen: dict[str, Tensor] = {}
        for part in parts:
            if part == "critic":
                loss, part_seen = self.critic_loss(batch, self.next_actions(batch, draws, flows))
            elif part == "data_critic":
                assert batch.next_actions is not None
                # SARSA: the data's own next action gives the value of the behaviour, not of the policy
                loss, part_seen = self.critic_loss(batch, batch.next_actions)
            elif part == "flow":
                loss, part_seen = self.flow_matching_loss(batch, draws)
            elif part == "actor":
                loss, part_seen = self.actor_loss(batch, draws, flows, log)
            else:
                continue
            losses.append(loss)
            seen.update(part_seen)  # not |=, which PyTorch 2.7 does not compile
        total_loss = torch.stack(losses).sum()
        return total_loss, {**seen, "total_loss": total_loss} if log else {}

    @torch.no_grad()
    def integrate(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, Tensor]:
        """Integrate all `starts` in one call; returns the ends under the same names."""
        starts = self.starts(batch, draws, parts)
        noises = [noise for noise, _ in starts.values()]
        observations = [self.view("flow", obs) for _, obs in starts.values()]
        config = self.config
        ends = fdkernels.integrate_flow_groups(
            self.flow, noises, observations, num_steps=config.flow_steps, precision=config.flow_precision
        )
        return dict(zip(starts, ends))

    def starts(self, batch: Batch, draws: Draws, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """The starts of `integrate`, under the names that the losses use.

        Each is noise (..., d) with observations that broadcast to it. This is only ``base``, the action that the actor
        loss starts from; an agent adds the others that it needs.
        """
        return {"base": (draws.base_noise, batch.observations)} if "actor" in parts else {}

    @abc.abstractmethod
    def next_actions(self, batch: Batch, draws: Draws, flows: dict[str, Tensor]) -> Tensor:
        """The policy's actions at the next observations, (B, d), without gradient."""

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Temporal-difference error of both critics against r + γ·m·Q_target(s', a')."""
        with torch.no_grad():
            next_qs = self.target_critic(self.view("critic", batch.next_observations), next_actions)
            next_q = next_qs.amin(0) if self.config.q_aggregation == "min" else next_qs.mean(0)
            target_q = batch.rewards + self.config.discount * batch.masks * next_q
        qs = self.critic(self.view("critic", batch.observations), batch.actions)
        loss = (qs - target_q).square().mean()
        return loss, {
            "next_actions": next_actions,
            "next_qs": next_qs,
            "target_q": target_q,
            "critic_q": qs,
            "critic_loss": loss,
        }

    def flow_matching_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """E‖v(x_t, t, s) − (a − x0)‖², the only loss that trains the flow (arXiv 2210.02747)."""
        x_t = (1 - draws.flow_t) * draws.flow_x0 + draws.flow_t * batch.actions
        velocity = batch.actions - draws.flow_x0
        predicted = self.flow(x_t, draws.flow_t, self.view("flow", batch.observations))
        loss = F.mse_loss(predicted, velocity)
        return loss, {"x_t": x_t, "velocity": velocity, "predicted_velocity": predicted, "flow_loss": loss}

    @abc.abstractmethod
    def actor_loss(
        self, batch: Batch, draws: Draws, flows: dict[str, Tensor], log: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The agent's own loss: climb Q, stay near the data."""

    def q_loss(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """−Q of the actions with the critics held constant; with ``normalize_q`` in units of mean |Q|."""
        qs = self.critic(self.view("critic", obs).detach(), actions, frozen=True)
        q = qs.mean(0)
        loss = -q.mean()
        if self.config.normalize_q:
            loss = loss / processes.batch_mean(q.detach().abs()).clamp(min=self.q_scale_floor)
        return loss, {"policy_q": qs, "q_loss": loss}

    # -- logging -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, batch: Batch, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `metric_names` that can be computed from the tensors of a logged update."""
        figures = {name: tensor for name, tensor in seen.items() if name in self.metric_names}
        if "critic_q" in seen:
            figures["q_data"] = seen["critic_q"].mean()
        if "policy_q" in seen:
            figures["q_policy"] = seen["policy_q"].mean()
            figures["action_error"] = F.mse_loss(seen["policy_actions"], batch.actions)
        return figures
