"""What the metric does to returns: the same flow and critics, refined in each metric at several sizes of trust region.

A seed's flow and critics are trained once. From there FiDec's displacement learns for as many updates as in the quick
preset, in each metric and at each size. Sizes in different metrics are not comparable, so that a refinement is placed
by what it costs: the fall of the behaviour's own log-density, mean log p(a) − log p(a + δ), which no metric is fitted
to.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.likelihood import log_prob
from train.data.load import load_dataset
from train.environments import resolve
from train.evaluate import evaluate
from train.loop import Run
from train.presets import preset_config
from train.settings import RunConfig

ENVS = ("halfcheetah-medium-expert", "mixed-halfcheetah-medium-expert")
VARIANTS: dict[str, dict[str, Any]] = {
    "isotropic": {"metric": "isotropic"},
    "score": {"metric": "score", "fisher_t": 0.95, "num_fisher_samples": 4},
    "score-0.8": {"metric": "score", "fisher_t": 0.8, "num_fisher_samples": 4},
    "cross": {"metric": "cross", "fisher_t": 0.95, "num_fisher_samples": 4},
    "pullback": {"metric": "pullback", "num_fisher_samples": 2},
}
SIZES = (3e-4, 1e-3, 3e-3)
STATES = 1024


def measure(env: str, seed: int, folder: Path, *, quick: bool = False) -> None:
    """Write a row of results to ``folder``/ENV-seedN-VARIANT-SIZE.json for each variant and size that has none yet."""
    todo = {
        (variant, size): folder / f"{env}-seed{seed}-{variant}-{size:g}.json"
        for size in (SIZES[:2] if quick else SIZES)
        for variant in VARIANTS
    }
    todo = {case: path for case, path in todo.items() if not path.exists()}
    if not todo:
        return
    config = preset_config("quick", "fidec", env)
    changes: dict[str, Any] = {"flow_warmup": 2_000, "critic_warmup": 500, "steps": 200} if quick else {}
    config = dataclasses.replace(
        config, env=env, seed=seed, acting="sample", eval_every=10**9, checkpoint_every=10**9, **changes
    )
    spec = resolve(env)
    dataset = load_dataset(spec)
    folder.mkdir(parents=True, exist_ok=True)

    def start(config: RunConfig, name: str) -> Run:
        run = Run(dataclasses.replace(config, out=folder / "runs" / name), spec, dataset, torch.device("cpu"))
        run.config.folder.mkdir(parents=True, exist_ok=True)
        return run

    trained = start(config, f"{env}-seed{seed}-warmup")
    weights = folder / f"{env}-seed{seed}-warmup.pt"
    warmup = config.flow_warmup + config.critic_warmup
    if weights.exists():
        state = torch.load(weights)
    else:
        for stage in trained.stages[:2]:
            while trained.step < stage.end:
                trained.set_learning_rate(stage)
                trained.update(trained.parts(stage), False)
                trained.step += 1
        state = trained.learner.state_dict()
        torch.save(state, weights)

    for (variant, size), path in todo.items():
        hyper = dataclasses.replace(config.hyper, target_divergence=size, **VARIANTS[variant])
        run = start(dataclasses.replace(config, hyper=hyper), f"{env}-seed{seed}-{variant}-{size:g}")
        run.learner.load_state_dict(state)
        run.step, stage = warmup, run.stages[-1]
        figures: dict[str, float] = {}
        while run.step < stage.end:
            run.set_learning_rate(stage)
            last = run.step + 1 == stage.end
            batch, seen = run.update(run.parts(stage), last)
            run.step += 1
            if last:
                figures = {name: value.item() for name, value in run.learner.figures(batch, seen)[0].items()}
        path.write_text(json.dumps({**describe(run), "figures": figures, "variant": variant, "size": size}))


@torch.no_grad()
def describe(run: Run) -> dict[str, Any]:
    """Returns, and what the displacement costs and gains over states of the data."""
    agent, generator = run.members[0].agent, torch.Generator().manual_seed(1)
    states = torch.randint(len(run.dataset.observations), (STATES,), generator=generator)
    obs = run.dataset.observations[states]
    noise = torch.randn(STATES, agent.action_dim, generator=generator)
    action = agent.flow_action(obs, noise)
    delta = agent.displacement(obs, action)  # type: ignore[operator]
    fall = log_prob(agent.flow, obs, action) - log_prob(agent.flow, obs, action + delta)
    gain = agent.critic(obs, (action + delta).clamp(-1, 1)).mean(0) - agent.critic(obs, action).mean(0)
    config = run.config
    seed = 1_000_000 * (config.seed + 1)
    returns = evaluate(agent, run.spec.env_id, config.acts, episodes=config.eval_episodes * 2, seed=seed)
    scale = run.spec.expert_return - run.spec.random_return
    return {
        "env": config.env,
        "seed": config.seed,
        "scores": {name: (100 * (rows - run.spec.random_return) / scale).tolist() for name, rows in returns.items()},
        "fall": fall.mean().item(),
        "fall_median": fall.median().item(),
        "gain": gain.mean().item(),
        "mean_square": delta.square().mean().item(),
    }
