"""The settings of a run. The fields are the command line's flags, and their docstrings its help."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.acting import FOR_REFINING_AGENTS, Acting, RuleName
from train.agents import AGENTS, AgentName
from train.agents.hyperparameters import AgentConfig, require, require_finite
from train.data.spec import Size

PresetName = Literal["auto", "quick", "standard", "full"]
_AGENTS_HELP = "; ".join(f"{name}: {agent.summary}" for name, agent in AGENTS.items()) + "."
MAY_CHANGE_ON_RESUME = {
    *("steps", "preset", "device", "out", "resume", "overwrite", "num_seeds", "capture", "profile"),
    *("eval_every", "eval_episodes", "interim_episodes", "log_every", "checkpoint_every"),
}


class RunError(RuntimeError):
    """Something the user can mend; shown without a traceback."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Train an offline RL agent on Minari data and evaluate it in MuJoCo."""

    env: str
    """What to learn, such as halfcheetah-medium-expert; `python train/environments.py` lists the names."""
    agent: Annotated[AgentName, tyro.conf.arg(help=_AGENTS_HELP)] = "fidec"
    preset: PresetName = "auto"
    """full: the published setting. quick: minutes on a laptop's CPU. standard: a quarter of an hour there. auto: quick
    where no GPU is used. Flags given beside it win."""
    steps: int = 1_000_000
    """Updates of the agent, after the warm-ups."""
    flow_warmup: int = 0
    """Updates before that of the flow alone. Not in the published schedule."""
    critic_warmup: int = 0
    """Updates between the two of the critics alone, on the data's own next actions. Not in the published schedule."""
    critic_warmup_n_step: int = 1
    """Rewards that a critic's target sums in its warm-up before it bootstraps. They are the data's own, so that nothing
    has to be corrected."""
    warmup_lr: float = 1e-3
    """Learning rate at the start of each warm-up; it falls along half a cosine to a twentieth of that."""
    anneal: bool = False
    """Let the agent's learning rate fall in the same way, towards the last of --steps, which then stays as it is."""
    batch_size: int = 256
    """Transitions per update."""
    seed: int = 0
    """Of everything drawn: parameters, batches, noise, evaluation."""
    num_seeds: int = 1
    """Train so many agents side by side, with seeds from --seed upward, each as if alone: AGENT-seedN is its folder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay updates as CUDA graphs. auto: where a CUDA device is used."""
    compile: bool = False
    """Compile the losses with torch.compile; the first update of each kind then takes a minute or more."""
    matmul_precision: Literal["highest", "high"] = "high"
    """Of float32 products on CUDA. high: TF32, as JAX does there. No effect on the CPU."""
    profile: bool = False
    """Write a trace of a few updates of the agent to trace.json in the folder; ui.perfetto.dev opens it."""
    out: Path | None = None
    """Folder of the run; runs/ENV/AGENT-seedN when not given. With several seeds, the folder that holds theirs."""
    resume: bool = False
    """Go on from the last checkpoint in the folder, if there is one."""
    overwrite: bool = False
    """Delete what another run left in the folder."""
    acting: RuleName = "sample"
    """How the agent acts when it is evaluated. sample: one action of the policy. best-of-n: of N flow actions the one
    of highest Q, refined. iterated: refined five times, the best of these. best-flow-of-n: the best of N, not
    refined. best-refined-of-n: the best of N refined ones. mean-flow-of-n, mean-refined-of-n: in the place of the best
    their mean, weighted by exp(Q / (temperature · mean |Q|))."""
    acting_samples: int = 10
    """That N."""
    acting_temperature: float = 0.004
    """That temperature."""
    eval_every: int = 100_000
    """Updates between evaluations, from when critics learn; also evaluated before those, and at the end."""
    eval_episodes: int = 50
    """Episodes of the evaluation at the end, played side by side."""
    interim_episodes: int | None = None
    """Episodes of those before. None: as many."""
    log_every: int = 5_000
    """Updates between rows of metrics."""
    checkpoint_every: int = 50_000
    """Updates between checkpoints; also written at the end and on Ctrl-C."""
    dataset_size: Size = "default"
    """Size of generated data: 100 or 1,000 episodes per behaviour policy. Downloaded data is always whole."""
    standardize_observations: bool = False
    """Shift and scale observations by the dataset's mean and standard deviation."""
    scale_rewards: bool = False
    """Divide rewards by the dataset's standard deviation."""
    center_critics: bool = False
    """Start both critics at the dataset's mean reward / (1 − γ) instead of near 0, so that they need not climb."""
    hyper: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    """Hyper-parameters."""

    def __post_init__(self) -> None:
        require_finite(self)
        require("seed", self.seed, self.seed >= 0, "zero or more")
        counts = (
            "critic_warmup_n_step",
            "num_seeds",
            "steps",
            "batch_size",
            "acting_samples",
            "eval_episodes",
            "interim_episodes",
        )
        for name in (*counts, "eval_every", "log_every", "checkpoint_every"):
            require(name, getattr(self, name), (value := getattr(self, name)) is None or value > 0, "positive")
        allowed = self.acting not in FOR_REFINING_AGENTS or AGENTS[self.agent].refines
        require("acting", self.acting, allowed, f"a rule without refinement for {self.agent}")
        require("discount", self.hyper.discount, self.hyper.discount < 1 or not self.center_critics, "below 1 here")
        for name in ("warmup_lr", "acting_temperature"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("flow_warmup", "critic_warmup"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "zero or more")
        for name in ("flow", "critic"):
            untrained = getattr(self.hyper, f"freeze_{name}_after") == 0 and getattr(self, f"{name}_warmup") == 0
            require(f"{name}_warmup", 0, not untrained, f"positive with --freeze-{name}-after 0, or nothing trains it")

    @property
    def acts(self) -> Acting:
        return Acting(self.acting, self.acting_samples, self.acting_temperature)

    @property
    def folder(self) -> Path:
        return self.out or self.group_folder / f"{self.agent}-seed{self.seed}"

    @property
    def group_folder(self) -> Path:
        """The folder that holds those of several seeds."""
        return self.out or Path("runs") / self.env

    def of_each_seed(self) -> list[RunConfig]:
        """For each agent, the settings that would train it alone."""
        if self.num_seeds == 1:
            return [self]
        alone = [dataclasses.replace(self, seed=self.seed + i, num_seeds=1) for i in range(self.num_seeds)]
        if self.out is None:
            return alone
        return [dataclasses.replace(config, out=self.out / f"{config.agent}-seed{config.seed}") for config in alone]

    def as_json(self) -> dict[str, Any]:
        """As it comes back from JSON: lists for tuples, text for paths."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def role_names(config: RunConfig) -> dict[str, str]:
    """What tables call the roles of an evaluation. "sample" is left out where it is how the agent acts anyway."""
    names = {
        "policy": f"{config.agent}, {config.acts}",
        "sample": f"{config.agent}, one sample",
        "flow": "behaviour flow (δ = 0)",
    }
    if config.acting == "sample":
        del names["sample"]
        names["policy"] = config.agent
    return names
