"""Train an offline RL agent and evaluate it: ``python train/run.py --env halfcheetah-medium-expert``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from fdkernels.policy.finite import NotFinite
from train import options, processes
from train.capture import CaptureError
from train.data import published
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable, NotInstalled
from train.environments import UnknownEnvironment, resolve
from train.exits import Exit
from train.loop import Run, captures, check_data
from train.memory import keep_freed_memory
from train.outputs import console
from train.outputs.console import Ending, Output
from train.outputs.folder import check_folder, lock_folders, prepare_folder
from train.presets import choose_preset, preset_config, preset_table
from train.settings import RunConfig, RunError

PROGRAM = "python train/run.py"
EXAMPLES = (
    (
        f"{PROGRAM} --env halfcheetah-medium-expert",
        "FiDec: minutes on a CPU; the published schedule on a GPU",
    ),
    (f"{PROGRAM} --env halfcheetah-medium-expert --resume", "go on after an interruption"),
    (f"{PROGRAM} --env hopper-medium --agent fql --preset standard --seed 1", "another agent, task and seed, longer"),
    (f"{PROGRAM} --env halfcheetah-medium-expert --preset full --help", "this help with the defaults of a preset"),
)
REFUSALS = (
    *(UnknownEnvironment, NotInstalled, DatasetUnavailable, RunError, CaptureError, NotFinite, OSError),
    processes.LostContact,
)
"""Errors that are shown without a traceback."""


def parse(argv: Sequence[str]) -> RunConfig:
    """The settings: the command line's flags on top of the preset that it asks for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags, absent in (
        (["--env"], None),
        (["--preset"], "auto"),
        (["--agent"], "fidec"),
        (["--device"], "auto"),
        (["--online-steps", "--online_steps"], ""),
    ):
        first.add_argument(*flags, nargs="?", default=absent, const=absent)
    known, _ = first.parse_known_args(argv)
    # what is misspelt or lacks its value passes through: tyro reports it, and `resolve` unknown environments
    try:
        online_steps = max(0, int(known.online_steps))
    except ValueError:
        online_steps = 0
    preset = choose_preset(known.preset, known.device)
    default = preset_config(preset, known.agent, known.env, online_steps)

    def ending() -> str:
        asked = f"--agent {known.agent}" + (f" --env {known.env}" if known.env else "")
        table = preset_table(known.agent, known.env, online_steps)
        return (
            f"The defaults above: --preset {preset} {asked}. Presets differ in these:\n\n{table}\n\n"
            f"{options.examples(*EXAMPLES)}"
        )

    return options.parse(RunConfig, argv, program=PROGRAM, default=default, ending=ending)


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


def choose_device(name: str, place: processes.Place) -> torch.device:
    if place.total > 1 and name != "cpu" and torch.cuda.is_available():
        if name not in ("auto", "cuda"):
            raise RunError(f"--device must be auto, cpu or cuda with several processes, got {name}: each takes a GPU")
        if place.local_rank >= (gpus := torch.cuda.device_count()):
            raise RunError(f"torchrun started more processes than there are GPUs on this machine, {gpus}")
        return torch.device("cuda", place.local_rank)
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device must be auto, cpu or cuda, got {name}")
    return device


def update_line(config: RunConfig, device: torch.device) -> str:
    how = "compiled" if config.compile else "plain"
    if captures(config, device):
        return f"{how}, replayed as CUDA graphs"
    return how + (", no CUDA graphs (--capture off)" if device.type == "cuda" else ", no CUDA graphs on the CPU")


def online_line(config: RunConfig) -> str:
    line = f"{config.online_steps:,} environment steps, one update each, acting {config.acts_online}"
    return f"{line}, replay {config.replay}" + (", the flow stays as it is" if config.freeze_flow_online else "")


def processes_line(config: RunConfig, place: processes.Place) -> str:
    fewest, most = config.batch_size // place.total, -(-config.batch_size // place.total)
    each = str(fewest) if fewest == most else f"{fewest} or {most}"
    return f"{place.total}, each with {each} of the batch's {config.batch_size} rows; the first writes and evaluates"


def check_settings(config: RunConfig) -> None:
    """Refuse processes that were started with different options: they would wait for each other for ever."""
    asked = {name: value for name, value in config.as_json().items() if name not in ("device", "out")}
    if not processes.agree(json.dumps(asked).encode()):
        raise RunError(f"the processes of this run have different settings; this one has {asked}")


def main(argv: Sequence[str] | None = None, *, patience: float = 0.0) -> int:
    """Train as the command line says; returns the exit code.

    Args:
        argv: the command line's options; None: those of this process.
        patience: seconds to wait for another process that trains in the same folder.
    """
    place = processes.as_started()
    with contextlib.ExitStack() as stack:
        if not place.leads:  # the leader says it all, but for errors
            silent = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        config = parse(sys.argv[1:] if argv is None else argv)
        output = config if place.leads else Output(quiet=True)
        who = f" (process {place.rank})" if place.total > 1 else ""
        again = "--resume goes on from the newest checkpoint"
        return console.conclude(lambda: train(config, patience), output, REFUSALS, again, who)


def train(config: RunConfig, patience: float = 0.0) -> Ending:
    """Train, by itself or in all processes that torchrun started.

    Raises:
        REFUSALS: one of them.
    """
    gpus = config.device != "cpu" and torch.cuda.is_available()
    # first of all, so that no process waits in vain for one that cannot start
    with processes.joined(gpus), contextlib.ExitStack() as locks:
        check_settings(config)
        ending = _train(config, locks, patience)
        processes.wait_for_leader()  # torchrun ends the others when one ends with an error
        return ending


def _train(config: RunConfig, locks: contextlib.ExitStack, patience: float) -> Ending:
    place = processes.place()
    spec = resolve(config.env)
    device = choose_device(config.device, place)
    if config.batch_size < place.total:
        raise RunError(f"--batch-size {config.batch_size} leaves nothing for some of {place.total} processes")
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(config.matmul_precision)
        torch.backends.cudnn.allow_tf32 = config.matmul_precision == "high"  # the encoders' convolutions
        # some updates run without a graph: the first ones, and all with --capture off
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    singles = config.of_each_seed()
    for single in singles if place.leads else ():
        check_folder(single.folder, single)
    seeds = f"seed {config.seed}" + (f" to {singles[-1].seed}" if len(singles) > 1 else "")
    how = update_line(config, device)
    print(f"run        {config.agent} on {config.env} ({spec.env_id}), {seeds}, {device}")
    print(f"preset     {preset_line(config)}")
    if choose_preset(config.preset, config.device) == "full":
        print(f"published  {published.describe(config.env, config.agent, config.online_steps > 0)}")
    print(f"update     {how}")
    if place.total > 1:
        print(f"processes  {processes_line(config, place)}")
    if config.online_steps:
        print(f"online     {online_line(config)}")
    print(f"folder     {' ... '.join(dict.fromkeys(str(s.folder) for s in (singles[0], singles[-1])))}", flush=True)
    dataset = load_dataset(spec, size=config.dataset_size)
    for line in dataset.source:
        print(f"data       {line}")
    check_data(config, dataset)
    if place.leads:
        locks.enter_context(lock_folders([single.folder for single in singles], patience))
        for single in singles:
            check_folder(single.folder, single)  # again: another run may have begun and ended since
        for single in singles:
            prepare_folder(single.folder, single)
    run = Run(config, spec, dataset, device)
    del dataset  # a run may keep a copy on another scale; together they would take twice the memory
    if config.resume:
        run.resume()
    sys.stdout.flush()
    run.train()
    problems = [f"{diverged}; see {diverged.folder}" for diverged in run.diverged if place.leads]
    if run.stopped:
        message = f"stopped at step {run.step:,}; --resume continues from there"
        return Ending("", {"error": message, "step": run.step} if place.leads else {}, Exit.STOPPED, problems)
    return Ending(*run.finish(), Exit.DIVERGED if run.diverged else Exit.DONE, problems)


if __name__ == "__main__":
    console.start(main)
