"""What the metric does to returns: one flow and one pair of critics, refined in each metric with several weights.

A seed's flow and critics are trained once and then stay as they are, with one step of policy improvement between them
and the policy (arXiv 2106.08909). FiDec's displacement alone learns, on the same batches and base actions in every
metric, for as many updates as in the quick preset. The weight α of the penalty is constant, so that it alone sets the
size. Sizes in different metrics are not comparable. A refinement is therefore placed by what it costs in log-density,
mean log p(a) − log p(a'), a' the refined action, under the flow of another seed, to which no metric was fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

import fdkernels
from benchmarks.evidence.likelihood import log_prob
from fdkernels.policy import Acting, Policy
from train.data.load import load_dataset
from train.data.transitions import Batch
from train.environments import resolve
from train.evaluate import run_episodes
from train.loop import Run
from train.presets import preset_config

ENVS = ("halfcheetah-medium-expert", "mixed-halfcheetah-medium-expert")
VARIANTS: dict[str, dict[str, Any]] = {
    "isotropic": {"metric": "isotropic"},
    "score": {"metric": "score", "fisher_t": 0.95, "num_fisher_samples": 4},
    "pullback": {"metric": "pullback", "num_fisher_samples": 2},
}
WEIGHTS = {ENVS[0]: (1.0, 3.0, 10.0), ENVS[1]: (30.0, 100.0, 10.0)}
"""α, the most telling ones first; a mixed action's small changes move the motors far."""
STATES = 1024
QUICK = {"flow_warmup": 2_000, "critic_warmup": 500, "steps": 200}


def start(env: str, seed: int, folder: Path, quick: bool, **hyper: Any) -> Run:
    """A run of the quick preset, with no files of its own but what evaluations draw."""
    config = preset_config("quick", "fidec", env)
    changes: dict[str, Any] = QUICK if quick else {}
    config = dataclasses.replace(
        config,
        env=env,
        seed=seed,
        acting="sample",
        out=folder,
        hyper=dataclasses.replace(config.hyper, **hyper),
        **changes,
    )
    spec = resolve(env)
    return Run(config, spec, load_dataset(spec), torch.device("cpu"))


def advance(run: Run, until: int) -> tuple[Batch, dict[str, Tensor]]:
    """Make the updates up to step ``until``; returns what the last one saw."""
    while run.step < until:
        stage = next(stage for stage in run.stages if run.step < stage.end)
        run.set_learning_rate(stage)
        # a batch and its base actions depend on the step alone, not on how much noise a metric draws
        run.generators[0].manual_seed(run.config.seed * 10**9 + run.step)
        seen = run.update(run.parts(stage), run.step + 1 == until)
        run.step += 1
    return seen


def warmed_up(env: str, seed: int, folder: Path, quick: bool) -> dict[str, Tensor]:
    """The weights after the warm-ups of flow and critics, trained by the first who asks."""
    path = folder / f"{env}-seed{seed}-warmup.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            run = start(env, seed, folder, quick, lagrange=False)
            advance(run, run.stages[1].end)
            torch.save(run.learner.state_dict(), path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
    return torch.load(path, weights_only=True)


def flow_answer(env: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """The score of the behaviour flow alone: FiDec before its displacement has learned anything."""
    run = start(env, seed, folder, quick, lagrange=False)
    run.learner.load_state_dict(warmed_up(env, seed, folder, quick))
    return {"env": env, "seed": seed, "variant": "flow", "alpha": None, "scores": play(run)}


def answer(env: str, seed: int, variant: str, alpha: float, folder: Path, quick: bool) -> dict[str, Any]:
    run = start(env, seed, folder, quick, lagrange=False, freeze_critic_after=0, alpha=alpha, **VARIANTS[variant])
    judge = start(env, seed + 1, folder, quick, lagrange=False)
    run.learner.load_state_dict(warmed_up(env, seed, folder, quick))
    judge.learner.load_state_dict(warmed_up(env, seed + 1, folder, quick))
    run.step = run.stages[1].end
    (figures,) = run.learner.figures(*advance(run, run.stages[2].end))
    numbers = {name: value.item() for name, value in figures.items()}
    return {**describe(run, judge.learner.flow), "figures": numbers, "variant": variant, "alpha": alpha}


def tasks(data: Path, seed: int, updates: tuple[int, ...], quick: bool) -> Iterator[tuple[Path, Any, tuple[Any, ...]]]:
    folder = data / "returns"
    for env in ENVS:
        yield folder / f"{env}-seed{seed}-flow.json", flow_answer, (env, seed, folder, quick)
    for i in range(2 if quick else 3):
        for variant in VARIANTS:
            for env, weights in WEIGHTS.items():
                path = folder / f"{env}-seed{seed}-{variant}-{weights[i]:g}.json"
                yield path, answer, (env, seed, variant, weights[i], folder, quick)


@torch.no_grad()
def describe(run: Run, judge: fdkernels.VelocityMLP) -> dict[str, Any]:
    """Returns, and what the displacement costs and gains over states of the data."""
    agent, generator = run.members[0].agent, torch.Generator().manual_seed(1)
    obs = run.dataset.sample(STATES, generator).observations
    noise = torch.randn(STATES, agent.action_dim, generator=generator)
    action = agent.flow_action(obs, noise)
    refined = agent.refine(obs, action)
    fall = log_prob(judge, obs, action) - log_prob(judge, obs, refined)
    gain = agent.critic(obs, refined).mean(0) - agent.critic(obs, action).mean(0)
    return {
        "env": run.config.env,
        "seed": run.config.seed,
        "scores": play(run),
        "fall": fall.mean().item(),
        "fall_median": fall.median().item(),
        "gain": gain.mean().item(),
        "mean_square": (refined - action).square().mean().item(),
    }


def play(run: Run) -> list[float]:
    """Normalised scores of one sample of the policy, over episodes that are the same for all variants."""
    seed = run.config.evaluation_seed
    policy = Policy(run.members[0].agent, Acting("sample"), seed=seed)
    outcomes = run_episodes(run.spec.env_id, policy, episodes=2 * run.config.eval_episodes, seed=seed)
    return run.spec.scoring(outcomes).tolist()
