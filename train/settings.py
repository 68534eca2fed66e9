"""The settings of a run. The fields are the command line's flags, and their docstrings are its help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fdkernels.policy import Acting, RuleName
from fdkernels.policy.acting import REFINING_RULES
from fdkernels.policy.player import LARGEST_SEED
from train.agents import AGENTS, AgentName
from train.agents.hyperparameters import AgentConfig, require, require_finite
from train.data.replay import Mixture
from train.data.spec import Size
from train.exits import Exit
from train.options import Group
from train.outputs.console import Output

PresetName = Literal["auto", "quick", "standard", "full"]
_AGENTS_HELP = "What is trained.\n" + "\n".join(f"- {name}: {agent.summary}." for name, agent in AGENTS.items())
MAY_CHANGE_ON_RESUME = {
    *("steps", "preset", "device", "out", "resume", "overwrite", "num_seeds", "capture", "profile"),
    *("eval_every", "eval_episodes", "interim_episodes", "log_every", "checkpoint_every", "online_steps"),
}
SEEDS_OF_A_RUN = 1_000_000
"""How many seeds of evaluation episodes each run has for itself."""
LARGEST_RUN_SEED = LARGEST_SEED // SEEDS_OF_A_RUN - 1
OF_ONLINE: dict[str, Any] = {"online_acting": None, "replay": "all", "online_lr": None, "freeze_flow_online": False}
"""Settings of the online updates with their defaults. They may change on resume until the first of these updates."""


class RunError(RuntimeError):
    """A problem that the user can fix; shown without a traceback."""

    exit_code = Exit.REFUSED


class RunDiverged(RunError):
    """The numbers of all seeds went wrong."""

    exit_code = Exit.DIVERGED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Group):
    """Updates of each stage, one after the other, and how they learn."""

    title = "schedule"

    flow_warmup: int = 0
    """Updates at the start in which the flow alone learns. Not in the published schedule."""
    critic_warmup: int = 0
    """Then updates in which the critics alone learn, on the data's next actions. Not in the published schedule."""
    steps: int = 1_000_000
    """Updates of the agent, after the warm-ups."""
    batch_size: int = 256
    """Transitions per update."""
    critic_warmup_n_step: int = 1
    """Rewards that a target sums before it bootstraps, in the critics' warm-up. The data's own actions earned them, so
    they need no off-policy correction."""
    n_step: int = 1
    """Rewards that a target sums in the agent's and the online updates. With more than one, the data's actions stand in
    for the policy's until it bootstraps, uncorrected. Fixed when the run begins."""
    warmup_lr: float = 1e-3
    """Learning rate at the start of each warm-up; it falls along half a cosine to a twentieth of this."""
    anneal: bool = False
    """Let the agent's learning rate fall in the same way until the last of --steps; --resume must then keep --steps.
    Online updates have their own, --online-lr."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Group):
    """The data, and their scale."""

    title = "data"

    dataset_size: Size = "default"
    """Size of generated data, in episodes for each policy that plays: default is 100, full 1,000. Downloaded data are
    always whole."""
    standardize_observations: bool = False
    """Shift and scale observations by the dataset's mean and standard deviation. States only."""
    scale_rewards: bool = False
    """Divide rewards by the dataset's standard deviation."""
    center_critics: bool = False
    """Start both critics at the dataset's mean reward / (1 − γ) instead of near 0, to spare them the climb."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Group):
    """How the agent acts when it is evaluated, and online; and when it is evaluated."""

    title = "acting and evaluation"

    acting: RuleName = "sample"
    """The acting rule; weights are exp(Q / (temperature · mean |Q|)).
    - sample: one action of the policy.
    - best-of-n: the flow action with the highest Q of N, refined.
    - iterated: one flow action, refined five times; the best of these.
    - best-flow-of-n: the best of N flow actions, not refined.
    - best-refined-of-n: the best of N refined actions.
    - mean-flow-of-n: the weighted mean of N flow actions.
    - mean-refined-of-n: the weighted mean of N refined actions.
    - flow: one action of the behaviour flow, which is behaviour cloning."""
    acting_samples: int = 10
    """N of the acting rule, in actions per state."""
    acting_temperature: float = 0.004
    """Temperature of the acting rule's weighted mean, as a share of mean |Q|."""
    eval_every: int = 100_000
    """Updates between evaluations, counted from the end of the flow's warm-up, where the first evaluation is made.
    There is always one at the end."""
    eval_episodes: int = 50
    """Episodes of the final evaluation, played side by side."""
    interim_episodes: int | None = None
    """Episodes of earlier evaluations. None: as many as the final one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online(Group):
    """After the data: learning from what the agent does in its environment. All need --online-steps."""

    title = "online"

    online_steps: int = 0
    """Environment steps, with one update after each. A finished run goes online with --resume --online-steps N and the
    settings that it began with; N may be raised again."""
    online_acting: RuleName | None = None
    """How the agent acts there. None: by --acting."""
    replay: Mixture = "all"
    """What online updates learn from.
    - all: the offline data and all that was seen online, as one (FQL).
    - balanced: half of each batch from the offline data, half from what was seen online (RLPD)."""
    online_lr: float | None = None
    """Learning rate of the online updates. None: --lr; quick and standard set it, whatever --lr is. It stays constant,
    also where --anneal had lowered that of the agent's updates to a twentieth: what is new keeps coming, and there is
    no end to anneal towards."""
    freeze_flow_online: bool = False
    """Leave the behaviour flow exactly as the offline updates left it. Without this it learns from the replay, and the
    trust region moves along with what the agent does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(Group):
    """The agent's own settings, in config.json under "hyper"."""

    title = "algorithm"

    hyper: Annotated[AgentConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=AgentConfig)
    """The agent's hyper-parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware(Group):
    """What computes, and how. torchrun starts several processes: torchrun --standalone --nproc-per-node 4 ..."""

    title = "hardware"

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ... auto: a GPU if there is one."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay updates as CUDA graphs. auto: on CUDA devices."""
    compile: bool = False
    """Compile the losses with torch.compile; the first update of each kind then takes a minute or more."""
    matmul_precision: Literal["highest", "high"] = "high"
    """Precision of float32 products on CUDA. high: TF32, as in JAX. No effect on the CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Group):
    """The run's folder, and what is written there."""

    title = "folder"

    out: Path | None = None
    """Folder of the run; runs/ENV/AGENT-seedN by default. With several seeds, the parent of their folders."""
    resume: bool = False
    """Continue from the last checkpoint in the folder, if there is one."""
    overwrite: bool = False
    """Delete the files of an earlier run in the folder."""
    log_every: int = 5_000
    """Updates between rows of metrics."""
    checkpoint_every: int = 50_000
    """Updates between checkpoints; one is also written after each stage and on Ctrl-C. They hold what was seen
    online."""
    profile: bool = False
    """Write a trace of a few of the agent's updates to trace.json in the run's folder, for ui.perfetto.dev, and what
    took longest in them to trace.txt."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Schedule, Data, Evaluation, Online, Algorithm, Hardware, Folder, Output):
    """Train an offline RL agent, let it go on online if asked to, and evaluate it in its simulator."""

    env: str
    """The environment, such as halfcheetah-medium-expert; `python train/environments.py` lists the names."""
    agent: Annotated[AgentName, tyro.conf.arg(help=_AGENTS_HELP)] = "fidec"
    preset: PresetName = "auto"
    """Which defaults the other options have.
    - full: the published schedule, hours on a GPU.
    - quick: minutes on a laptop's CPU.
    - standard: a quarter of an hour there.
    - auto: full on a GPU, else quick."""
    seed: int = 0
    """Seed of everything random: parameters, batches, noise, evaluation."""
    num_seeds: int = 1
    """Train this many agents side by side, with seeds from --seed upward. Each learns as if alone, and has its own
    folder AGENT-seedN."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_seed("seed", self.seed)
        counts = (
            "critic_warmup_n_step",
            "n_step",
            "num_seeds",
            "steps",
            "batch_size",
            "eval_episodes",
            "interim_episodes",
        )
        for name in (*counts, "eval_every", "log_every", "checkpoint_every"):
            require(name, getattr(self, name), (value := getattr(self, name)) is None or value > 0, "positive")
        last = self.seed + self.num_seeds - 1
        require(
            "num_seeds",
            self.num_seeds,
            last <= LARGEST_RUN_SEED,
            f"small enough for seeds of at most {LARGEST_RUN_SEED}",
        )
        check_acting(acting_samples=self.acting_samples, acting_temperature=self.acting_temperature)
        size = self.dataset_size
        require("dataset_size", size, isinstance(size, str) or size > 0, "default, full or a positive number")
        for name in ("acting", "online_acting"):
            allowed = getattr(self, name) not in REFINING_RULES or AGENTS[self.agent].refines
            require(name, getattr(self, name), allowed, f"a rule without refinement for {self.agent}")
        require("discount", self.hyper.discount, self.hyper.discount < 1 or not self.center_critics, "below 1 here")
        require("warmup_lr", self.warmup_lr, self.warmup_lr > 0, "positive")
        for name in ("flow_warmup", "critic_warmup", "online_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "zero or more")
        for name in ("flow", "critic"):
            untrained = getattr(self.hyper, f"freeze_{name}_after") == 0 and getattr(self, f"{name}_warmup") == 0
            require(f"{name}_warmup", 0, not untrained, f"positive with --freeze-{name}-after 0, or nothing trains it")
        alone = self.online_steps == 0 or self.num_seeds == 1
        require("online_steps", self.online_steps, alone, "0 with several seeds; each can --resume alone with it")
        for name, default in OF_ONLINE.items():
            value = getattr(self, name)
            require(name, value, self.online_steps > 0 or value == default, f"{default} without --online-steps")
        require("online_lr", self.online_lr, self.online_lr is None or self.online_lr > 0, "positive")
        even = self.replay != "balanced" or self.batch_size % 2 == 0
        require("batch_size", self.batch_size, even, "even with --replay balanced")

    @property
    def acts(self) -> Acting:
        return Acting(self.acting, self.acting_samples, self.acting_temperature)

    @property
    def acts_online(self) -> Acting:
        return dataclasses.replace(self.acts, rule=self.online_acting or self.acting)

    @property
    def evaluation_seed(self) -> int:
        """Of the first episode of every evaluation: the same initial states each time, others for another seed."""
        return SEEDS_OF_A_RUN * (self.seed + 1)

    @property
    def offline_steps(self) -> int:
        """Updates before the online ones."""
        return self.flow_warmup + self.critic_warmup + self.steps

    @property
    def folder(self) -> Path:
        return self.out or self.group_folder / f"{self.agent}-seed{self.seed}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def group_folder(self) -> Path:
        """The parent of the folders of several seeds."""
        return self.out or Path("runs") / self.env

    @property
    def group_curve(self) -> Path:
        """The picture of several seeds."""
        return self.group_folder / f"{self.agent}-seeds{self.seed}to{self.seed + self.num_seeds - 1}.png"

    def of_each_seed(self) -> list[RunConfig]:
        """For each seed, the settings that would train its agent alone."""
        if self.num_seeds == 1:
            return [self]
        alone = [dataclasses.replace(self, seed=self.seed + i, num_seeds=1) for i in range(self.num_seeds)]
        if self.out is None:
            return alone
        return [dataclasses.replace(config, out=self.out / f"{config.agent}-seed{config.seed}") for config in alone]

    def as_json(self) -> dict[str, Any]:
        """The settings as they come back from JSON: tuples as lists, paths as text. How to print is none of them."""
        settings = {"env": self.env, "agent": self.agent} | dataclasses.asdict(self)
        for field in dataclasses.fields(Output):
            del settings[field.name]
        return json.loads(json.dumps(settings, default=str))


def require_seed(name: str, seed: int) -> None:
    require(name, seed, 0 <= seed <= LARGEST_RUN_SEED, f"zero or more, and at most {LARGEST_RUN_SEED}")


def check_acting(*, acting_samples: int | None, acting_temperature: float | None) -> None:
    """Raise ValueError, which names the flag, if `Acting` refuses a setting; None is not looked at."""
    for flag, setting in (
        ("acting-samples", {"num_samples": acting_samples}),
        ("acting-temperature", {"temperature": acting_temperature}),
    ):
        try:
            Acting(**{name: value for name, value in setting.items() if value is not None})  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}") from error


def check_observations(config: RunConfig, shape: Sequence[int]) -> None:
    """Refuse settings that do not fit observations of that shape.

    Raises:
        RunError: images without an encoder or standardised; states with an encoder or what goes with one.
    """
    hyper, images = config.hyper, len(shape) > 1
    if images and hyper.encoder == "none":
        raise RunError(f"the observations are images of shape {tuple(shape)}, which need --encoder impala-small")
    if images and config.online_steps:
        raise RunError("--online-steps is for states; its replay does not stack frames")
    if images and config.standardize_observations:
        raise RunError("--standardize-observations is for states; an encoder scales images itself")
    if not images and (hyper.encoder != "none" or hyper.frame_stack > 1 or hyper.augment > 0):
        raise RunError(
            f"the observations are states of {shape[0]} numbers; --encoder, --frame-stack and --augment are for images"
        )


def role_names(config: RunConfig) -> dict[str, str]:
    """Names of the evaluation's roles in tables. "sample" is left out if it is the acting rule anyway."""
    names = {
        "policy": f"{config.agent}, {config.acts}",
        "sample": f"{config.agent}, one sample",
        "flow": "behaviour flow (δ = 0)",
    }
    if config.acting == "sample":
        del names["sample"]
        names["policy"] = config.agent
    return names
