"""Play a finished run, print its scores, and film or export its policy if asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from fdkernels.policy import Acting, NotFinite, Policy, PolicyError, RuleName, export_policy, load_policy
from fdkernels.policy.export import SUFFIXES
from fdkernels.policy.player import LARGEST_SEED
from train import options
from train.agents.hyperparameters import require
from train.data.spec import EnvSpec, NotInstalled
from train.environments import UnknownEnvironment, resolve
from train.evaluate import run_episodes
from train.outputs import console
from train.outputs.best import best_file
from train.outputs.console import Ending, Output
from train.outputs.policy import FILE
from train.rendering import render_off_screen
from train.settings import check_acting
from train.simulator import kept_vector_env

WIDTH, HEIGHT = 480, 320
PROGRAM = "python train/play.py"
EXAMPLES = (
    (f"{PROGRAM} runs/halfcheetah-medium-expert/fidec-seed0", "ten episodes, acting as the run did"),
    (f"{PROGRAM} RUN --acting best-of-n --acting-samples 16 --record cheetah.gif", "another acting rule, filmed"),
    (f"{PROGRAM} RUN --export cheetah.onnx", "the policy as a graph that runs elsewhere"),
    (f"{PROGRAM} RUN --episodes 100 --json | jq .score_mean", "a number for a script"),
)


class PlayError(RuntimeError):
    """A problem that the user can fix."""


REFUSALS = (PlayError, PolicyError, UnknownEnvironment, NotInstalled, OSError)
"""Errors that are shown without a traceback."""


@dataclasses.dataclass(frozen=True)
class PlayConfig(Output):
    """Play a finished run, print its scores, and film or export its policy if asked to."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, with policy.safetensors, or checkpoints/best-*.safetensors for --best; or such a file."""
    acting: RuleName | None = None
    """Acting rule, see `python train/run.py --help`. None: the run's own."""
    acting_samples: int | None = None
    """N, for rules that draw several actions per state. None: the run's own."""
    acting_temperature: float | None = None
    """Temperature of the weighted means, as a share of mean |Q|. None: the run's own."""
    best: bool = False
    """Play the policy of the run's best evaluation so far, not that of its last update. It may still be training."""
    episodes: int = 10
    """Episodes to play, side by side."""
    seed: int = 0
    """Seed of the initial states and the noise."""
    record: Path | None = None
    """Also film one episode: a .gif, or with `pip install imageio[ffmpeg]` an .mp4."""
    seconds: float = 10.0
    """Length of the film in seconds of the simulation."""
    export: Path | None = None
    """Also write the policy, under its acting rule, as a graph that runs without this project: a .pt2 of torch.export,
    or an .onnx. See docs/policies.md."""

    def __post_init__(self) -> None:
        require("seed", self.seed, 0 <= self.seed <= LARGEST_SEED, f"zero or more, and at most {LARGEST_SEED}")
        for name in ("episodes", "seconds"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        check_acting(acting_samples=self.acting_samples, acting_temperature=self.acting_temperature)
        known = self.export is None or self.export.suffix in SUFFIXES
        require("export", self.export, known, f"a file ending in {' or '.join(SUFFIXES)}")

    def acts(self, judged_by: Acting) -> Acting:
        """The acting rule asked for; settings that were not given are the run's own."""
        asked: dict[str, Any] = {
            "rule": self.acting,
            "num_samples": self.acting_samples,
            "temperature": self.acting_temperature,
        }
        return dataclasses.replace(judged_by, **{name: value for name, value in asked.items() if value is not None})


def film(spec: EnvSpec, act: Callable[[np.ndarray], np.ndarray], path: Path, seed: int, seconds: float) -> str:
    """Film the first seconds of an episode, in real time."""
    render_off_screen()
    import gymnasium as gym
    import imageio.v3 as imageio

    view: dict[str, Any] = {} if spec.camera is None else {"width": WIDTH, "height": HEIGHT, "camera_name": spec.camera}
    env = gym.make(spec.env_id, render_mode="rgb_array", **view)
    frames: list[Any] = []
    over = False
    partial = path.with_name(f".{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        fps = int(env.metadata["render_fps"])
        obs, _ = env.reset(seed=seed)
        while not over and len(frames) < seconds * fps:
            frames.append(env.render())
            obs, _, terminated, truncated, _ = env.step(act(obs[None])[0])
            over = terminated or truncated
        speed: dict[str, Any] = {"fps": fps}
        shown = frames
        if path.suffix == ".gif":
            # GIF counts in hundredths of a second, and viewers slow down frames shorter than two of them
            every = next(n for n in range(1, fps + 1) if n * 1000 % (10 * fps) == 0 and n * 1000 >= 20 * fps)
            shown, speed = frames[::every], {"duration": every * 1000 // fps, "loop": 0}
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(partial, np.stack(shown), **speed)
        partial.replace(path)
    except Exception as error:  # from the renderer or the file writer
        raise PlayError(f"--record {path}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    finally:
        env.close()
        with contextlib.suppress(OSError):
            partial.unlink()
    return f"{path}: {len(frames) / fps:.1f} s"


def exported(policy: Policy, path: Path) -> str:
    """Write the policy as a graph."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        export_policy(policy, path)
    except ImportError as error:
        raise PlayError(f"--export {path}: {error}") from error
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB"


def check_fits(policy: Policy, spec: EnvSpec, config: PlayConfig) -> None:
    """Refuse a policy whose weights are for other observations or actions than its environment's.

    Raises:
        PlayError: they are.
    """
    envs = kept_vector_env(spec.env_id, config.episodes)
    seen, acts = envs.single_observation_space.shape, envs.single_action_space.shape
    wanted = policy.observation_shape, (policy.action_dim,)
    if (seen, acts) != wanted:
        raise PlayError(
            f"the policy in {config.run} is for observations {wanted[0]} and actions {wanted[1]}, and {policy.env} has "
            f"{seen} and {acts}"
        )


def parse(argv: Sequence[str] | None) -> PlayConfig:
    return options.parse(PlayConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def file_of(config: PlayConfig) -> Path:
    """The file of the policy to play.

    Raises:
        PolicyError: --best finds none.
    """
    if config.best:
        return best_file(config.run)
    return config.run if config.run.is_file() else config.run / FILE


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    return console.conclude(lambda: play(config), config, REFUSALS)


def play(config: PlayConfig) -> Ending:
    file = file_of(config)
    policy = load_policy(file)
    try:
        spec = resolve(policy.env)
    except UnknownEnvironment as error:
        raise PlayError(f"the policy in {config.run} is for an {error}") from error
    spec.check_installed()
    acting = config.acts(policy.acting)
    try:
        act = Policy(policy.network, acting, seed=config.seed)
    except ValueError as error:  # a rule that is not for this policy
        raise PlayError(f"{config.run}: {error}") from error
    check_fits(policy, spec, config)
    try:
        outcomes = run_episodes(spec.env_id, act, episodes=config.episodes, seed=config.seed)
    except NotFinite as error:
        raise PlayError(f"{config.run}: {error}") from error
    score = spec.scoring(outcomes)
    print(f"{'episode':>8}{'return':>10}{'score':>8}")
    for i, row in enumerate(zip(outcomes.returns, score)):
        print("{:>8}{:>10,.0f}{:>8.1f}".format(i, *row))
    sem = score.std(ddof=1) / len(score) ** 0.5 if len(score) > 1 else 0.0
    of_file = f" ({file.name})" if config.best else ""
    text = f"{acting} in {spec.env_id}: score {score.mean():.1f} ± {sem:.1f}{of_file}"
    if config.record is not None:
        act.reset(config.seed)
        text += f"\n{film(spec, act, config.record, config.seed, config.seconds)}"
    if config.export is not None:
        text += f"\n{exported(act, config.export)}"
    episodes = zip(outcomes.returns.tolist(), score.tolist(), outcomes.successes.tolist())
    document = {
        "run": config.run,
        "policy": file,
        "env": policy.env,
        "env_id": spec.env_id,
        "acting": dataclasses.asdict(acting),
        "score_mean": float(score.mean()),
        "score_sem": float(sem),
        "episodes": [dict(zip(("return", "score", "success"), episode)) for episode in episodes],
        "film": config.record,
        "export": config.export,
    }
    return Ending(text, document)


if __name__ == "__main__":
    console.start(main)
