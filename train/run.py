"""Train an offline RL agent and evaluate it: ``python train/run.py --env halfcheetah-medium-expert``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import tyro
from tqdm import tqdm

from train.agents import AGENTS, ALL_PARTS, Agent, Part
from train.checkpoint import newest_checkpoint, save_checkpoint, write_safetensors, write_whole
from train.config import MAY_CHANGE_ON_RESUME, RunConfig, choose_preset, preset_config
from train.curve import draw_curve
from train.data import DatasetUnavailable, OfflineDataset, load_dataset
from train.environments import EnvSpec, UnknownEnvironment, normalized_score, resolve
from train.evaluate import evaluate
from train.record import Record


class RunError(RuntimeError):
    """Something the user can mend; shown without a traceback."""


class Stage(NamedTuple):
    name: str
    start: int
    end: int
    parts: Sequence[Part]
    """Losses of its updates."""


class Run:
    """Data, agent and optimiser of one run, and the loop over them."""

    def __init__(self, config: RunConfig, spec: EnvSpec, dataset: OfflineDataset, device: torch.device) -> None:
        self.config, self.spec = config, spec
        torch.manual_seed(config.seed)
        agent = AGENTS[config.agent](config.hyper, dataset.observations.shape[1], dataset.actions.shape[1])
        if config.standardize_observations:
            agent.obs_mean.copy_(dataset.observations.mean(0))
            agent.obs_std.copy_(dataset.observations.std(0) + 1e-3)
        self.dataset = dataclasses.replace(
            dataset,
            observations=(dataset.observations - agent.obs_mean) / agent.obs_std,
            next_observations=(dataset.next_observations - agent.obs_mean) / agent.obs_std,
            rewards=dataset.rewards / dataset.rewards.std() if config.scale_rewards else dataset.rewards,
        ).to(device)
        if config.center_critics:
            agent.center_critics(float(self.dataset.rewards.mean()))
        self.agent: Agent = agent.to(device)
        self.optimizer = self.agent.make_optimizer()
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.step = 0
        self.seconds = 0.0
        self.evaluations: list[dict[str, Any]] = []
        self.stop_requested = False

        flow_end = config.flow_warmup
        critic_end = flow_end + config.critic_warmup
        self.stages = [
            Stage("flow warm-up", 0, flow_end, ("flow",)),
            Stage("critic warm-up", flow_end, critic_end, ("data_critic",)),
            Stage(config.agent, critic_end, critic_end + config.steps, ALL_PARTS),
        ]

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Go through the stages from the step reached so far; a checkpoint holds whatever was done when it returns."""
        self.record = Record(self.config.folder, self.step, self.evaluations)
        self.clock = time.perf_counter() - self.seconds
        handlers = {signum: signal.signal(signum, self.request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            for stage in self.stages:
                if stage.start <= self.step < stage.end and not self.stop_requested:
                    self._train(stage)
        finally:
            self.record.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _train(self, stage: Stage) -> None:
        config, last = self.config, stage is self.stages[-1]
        if last and self.step == stage.start and not self.evaluations:
            self.evaluate()
        bar = tqdm(
            desc=stage.name,
            initial=self.step - stage.start,
            total=stage.end - stage.start,
            unit="update",
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        with bar:
            logged_step, logged_at = self.step, time.perf_counter()
            while self.step < stage.end and not self.stop_requested:
                batch = self.dataset.sample(config.batch_size, self.generator)
                draws = self.agent.draw(config.batch_size, self.generator)
                self.set_learning_rate(stage)
                seen = self.agent.update(self.optimizer, batch, draws, stage.parts)
                self.step += 1
                bar.update()
                done = self.step - stage.start
                if done % config.log_every == 0 or self.step == stage.end:
                    figures = {name: value.item() for name, value in self.agent.metrics(batch, seen).items()}
                    rate = (self.step - logged_step) / (time.perf_counter() - logged_at)
                    self.record.add_metrics(self.step, stage.name, rate, figures)
                    broken = [f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value)]
                    if broken:
                        raise RunError(f"training diverged before step {self.step}: {', '.join(broken)}")
                    bar.set_postfix_str(postfix(figures), refresh=False)
                    logged_step, logged_at = self.step, time.perf_counter()
                if last and (done % config.eval_every == 0 or self.step == stage.end):
                    self.evaluate()
                    logged_at = time.perf_counter()
                if self.step % config.checkpoint_every == 0 or self.step == stage.end:
                    self.save()
        if self.stop_requested:
            self.save()

    def set_learning_rate(self, stage: Stage) -> None:
        """Constant for the agent, annealed in each warm-up, which a noisy last iterate would spoil."""
        lr = self.config.hyper.lr
        if stage is not self.stages[-1]:
            progress = (self.step - stage.start) / (stage.end - stage.start)
            lr = self.config.warmup_lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: finish what is under way, write a checkpoint, leave. A second signal acts at once."""
        signal.signal(signum, signal.SIG_DFL)
        tqdm.write("stopping after this update or evaluation, with a checkpoint; once more to stop at once")
        self.stop_requested = True

    # -- what it leaves behind -----------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Returns of the policy and of the behaviour flow alone, from the same initial states."""
        config = self.config
        # the same initial states at every evaluation, other ones for another seed
        returns = evaluate(
            self.agent, self.spec.env_id, episodes=config.eval_episodes, seed=1_000_000 * (config.seed + 1)
        )
        self.seconds = time.perf_counter() - self.clock
        for role, values in returns.items():
            sem = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            scores = normalized_score(self.spec, values)
            row = {
                "step": self.step,
                "role": role,
                "return_mean": float(values.mean()),
                "return_sem": float(sem),
                "score_mean": float(scores.mean()),
                "score_sem": float(sem * 100 / (self.spec.expert_return - self.spec.random_return)),
                "episodes": len(values),
            }
            self.evaluations.append(row)
            self.record.add_evaluation(row)
        policy, flow = self.evaluations[-2:]
        tqdm.write(
            f"update {self.step - self.stages[-1].start:>7,}  score {policy['score_mean']:5.1f} ± "
            f"{policy['score_sem']:.1f}   flow alone {flow['score_mean']:5.1f} ± {flow['score_sem']:.1f}"
            f"   {self.seconds / 60:.1f} min"
        )
        draw_curve(config.folder, config, self.dataset_score, score_label(self.spec))

    def save(self) -> None:
        self.seconds = time.perf_counter() - self.clock
        notes = {"data": self.data_identity, "evaluations": self.evaluations, "seconds": self.seconds}
        folder = self.config.folder / "checkpoints"
        save_checkpoint(folder, self.step, self.agent, self.optimizer, self.generator, notes)

    def resume(self) -> None:
        """Continue from the newest whole checkpoint in the folder; without one, begin."""
        checkpoint, problems = newest_checkpoint(self.config.folder / "checkpoints")
        for problem in problems:
            print(f"refused    {problem}")
        if checkpoint is None:
            print(f"resume     no checkpoint in {self.config.folder}: starting at update 0")
            return
        if checkpoint.notes["data"] != self.data_identity:
            raise RunError(
                f"--resume: {checkpoint.path} was trained on other data: {checkpoint.notes['data']}, "
                f"and now there is {self.data_identity}"
            )
        checkpoint.restore(self.agent, self.optimizer, self.generator)
        self.step = checkpoint.step
        self.evaluations, self.seconds = checkpoint.notes["evaluations"], checkpoint.notes["seconds"]
        print(f"resume     {checkpoint.path}, step {self.step:,}")

    @property
    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        returns = zlib.crc32(self.dataset.episode_returns.tobytes())
        return {"ids": list(self.dataset.dataset_ids), "transitions": len(self.dataset), "returns_crc32": returns}

    @property
    def dataset_score(self) -> float:
        return float(normalized_score(self.spec, float(self.dataset.episode_returns.mean())))

    def finish(self) -> None:
        """Weights, summary and the final table."""
        config = self.config
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.agent.state_dict().items()}
        header = {"env": config.env, "agent": config.agent, "hyper": json.dumps(config.as_json()["hyper"])}
        write_safetensors(config.folder / "policy.safetensors", weights, header)
        results = {
            role: {
                "last": rows[-1],
                "best": max(rows, key=lambda row: row["score_mean"]),
            }
            for role in ("policy", "flow")
            if (rows := [row for row in self.evaluations if row["role"] == role])
        }
        summary = {
            "config": config.as_json(),
            "env_id": self.spec.env_id,
            "dataset_ids": self.dataset.dataset_ids,
            "dataset_return": float(self.dataset.episode_returns.mean()),
            "dataset_score": self.dataset_score,
            "seconds": self.seconds,
            "torch": torch.__version__,
            "results": results,
        }
        write_whole(config.folder / "result.json", json.dumps(summary, indent=2) + "\n")
        print(final_table(self, results))


def postfix(figures: dict[str, float]) -> str:
    """The figures that fit behind a progress bar."""
    shown = {"flow": "flow_loss", "td": "critic_loss", "penalty": "penalty", "α": "alpha", "Q": "q_policy"}
    shown |= {"‖δ‖": "displacement_norm", "λ₁/Σλ": "top_eigenvalue_share"}
    return " ".join(f"{label}={figures[name]:.3g}" for label, name in shown.items() if name in figures)


def score_label(spec: EnvSpec) -> str:
    return f"D4RL-normalised score ({spec.env_id})"


def final_table(run: Run, results: dict[str, dict[str, dict[str, Any]]]) -> str:
    warmup = run.stages[-1].start
    lines = [
        "",
        f"{score_label(run.spec)}: 0 = random ({run.spec.random_return:,.0f}), 100 = expert "
        f"({run.spec.expert_return:,.0f}); {run.config.eval_episodes} episodes, ± standard error",
        "",
        f"{'':24}{'return, last':>18}{'score, last':>16}{'score, best':>16}{'at update':>12}",
    ]
    for role, name in (("policy", run.config.agent), ("flow", "behaviour flow (δ = 0)")):
        last, best = results[role]["last"], results[role]["best"]
        lines.append(
            f"{name:24}{last['return_mean']:>10,.0f} ± {last['return_sem']:<5,.0f}"
            f"{last['score_mean']:>9.1f} ± {last['score_sem']:<4.1f}"
            f"{best['score_mean']:>9.1f} ± {best['score_sem']:<4.1f}{best['step'] - warmup:>12,}"
        )
    lines.append(f"{'dataset':24}{run.dataset.episode_returns.mean():>10,.0f}{'':8}{run.dataset_score:>9.1f}")
    lines += ["", f"{run.seconds / 60:.1f} minutes. In {run.config.folder}: curve.png, metrics.csv, evaluations.csv, "]
    lines[-1] += "tensorboard/, policy.safetensors, result.json"
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> RunConfig:
    """The command line, on top of the preset that it asks for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="auto")
    first.add_argument("--agent", default="fidec")
    first.add_argument("--device", default="auto")
    known, _ = first.parse_known_args(argv)
    # a misspelt preset or agent is left to tyro, which names the choices
    default = preset_config(choose_preset(known.preset, known.device), known.agent)
    return tyro.cli(RunConfig, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))


def preset_line(config: RunConfig) -> str:
    name = choose_preset(config.preset, config.device)
    if config.preset == "auto":
        name += " (on a GPU)" if name == "full" else " (no GPU in use; --preset full is the published setting)"
    hyper = config.hyper
    return (
        f"{name}: {config.flow_warmup:,} + {config.critic_warmup:,} warm-up and {config.steps:,} agent updates, batch "
        f"{config.batch_size}, actors {'-'.join(map(str, hyper.actor_hidden))}, critics "
        f"{'-'.join(map(str, hyper.critic_hidden))}, {hyper.flow_steps} flow steps"
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device must be auto, cpu or cuda, got {name}")
    return device


LEFT_BY_A_RUN = (
    *("config.json", "metrics.csv", "evaluations.csv", "curve.png", "policy.safetensors", "result.json"),
    *("checkpoints", "tensorboard"),
)


def check_folder(folder: Path, config: RunConfig) -> None:
    """Never mix two runs in one folder, never lose one, never touch what no run made."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        before = json.loads((folder / "config.json").read_text())
        before |= before.pop("hyper")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is there and no run made it (no config.json of ours): use another --out") from error
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} already holds a run: --resume continues it, --overwrite deletes it, --out DIR avoids it"
        )
    if config.resume:
        now = config.as_json()
        now |= now.pop("hyper")
        changed = [name for name in now if name not in MAY_CHANGE_ON_RESUME and now[name] != before.get(name)]
        if changed:
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            raise RunError(f"--resume: the run in {folder} was started with {was}")


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder of the run and write its settings there."""
    if config.overwrite and not config.resume:
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(config.as_json(), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(sys.argv[1:] if argv is None else argv)
    try:
        spec = resolve(config.env)
        device = choose_device(config.device)
        check_folder(config.folder, config)
        print(f"run        {config.agent} on {config.env} ({spec.env_id}), seed {config.seed}, {device}")
        print(f"preset     {preset_line(config)}")
        print(f"folder     {config.folder}", flush=True)
        dataset = load_dataset(spec, size=config.dataset_size)
        for line in dataset.source:
            print(f"data       {line}")
        prepare_folder(config.folder, config)
        run = Run(config, spec, dataset, device)
        if config.resume:
            run.resume()
        sys.stdout.flush()
        run.train()
    except (UnknownEnvironment, DatasetUnavailable, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training, or a second one during it
        print("stopped", file=sys.stderr)
        return 130
    if run.stop_requested:
        print(f"stopped at step {run.step:,}; --resume continues from there")
        return 130
    run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
