"""The folder of a run: check that it may be used, lock it, and write its config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.outputs.checkpoint import newest_step
from train.outputs.files import create_folder, remove_partial, sync_folder, write_whole
from train.reading import read_json, require_type, shown
from train.settings import MAY_CHANGE_ON_RESUME, OF_ONLINE, RunConfig, RunError

LEFT_BY_A_RUN = (
    *("result.json", "policy.safetensors", "metrics.csv", "evaluations.csv", "curve.png", "trace.json", "trace.txt"),
    *("tensorboard", "diverged.safetensors"),
)
"""Besides config.json, which is replaced, and the checkpoints."""
LOCK = ".lock"
LOG = "log.txt"
"""What a trial of a sweep prints."""
BEFORE_A_RUN = {LOCK, LOG, "config.json.partial"}
"""What may be in a folder before its run begins; the last is of one that was killed while it wrote its first file."""


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise RunError rather than mix two runs in one folder, lose a run, or touch a folder that no run made."""
    if config.resume and config.overwrite:
        raise RunError("--resume goes on with a run and --overwrite deletes it: give one of them")
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= BEFORE_A_RUN):
        return
    try:
        before = read_json(folder / "config.json")
        before |= before.pop("hyper")
        before = defaults(config) | before  # a setting that is newer than the run had its default
        for name in ("flow_warmup", "critic_warmup", "steps", "online_steps"):
            require_type(name, before[name], int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is there and no run made it (no config.json of ours): use another --out") from error
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} already holds a run: --resume continues it, --overwrite deletes it, --out DIR avoids it"
        )
    for name in (*LEFT_BY_A_RUN, "checkpoints", LOG):
        if (folder / name).is_symlink():  # what is written or deleted there would be elsewhere
            raise RunError(f"{folder / name} is a symbolic link, which no run makes: put what it leads to in its place")
    if config.resume:
        now = config.as_json()
        now |= now.pop("hyper")
        step = newest_step(folder / "checkpoints")
        online = step - before["flow_warmup"] - before["critic_warmup"] - before["steps"]
        is_online = before["online_steps"] > 0 and online > 0
        if is_online and config.online_steps < online:
            raise RunError(
                f"--online-steps must be at least {online:,} to --resume the run in {folder}: it did as many"
            )
        may_change = MAY_CHANGE_ON_RESUME | (set() if is_online else OF_ONLINE.keys())
        may_change -= {"steps"} if config.anneal or is_online else set()
        if config.online_steps and not before["online_steps"] and online == 0 and config.steps > before["steps"]:
            raise RunError(
                f"--resume: the run in {folder} finished its --steps {before['steps']}; go online with that, or first "
                f"--resume with --steps {config.steps} alone"
            )
        changed = [name for name in now if name not in may_change and now[name] != before.get(name)]
        if changed:
            was = ", ".join(f"--{name.replace('_', '-')} {shown(before.get(name))}" for name in changed)
            raise RunError(f"--resume: the run in {folder} was started with {was}")
        least = step - config.flow_warmup - config.critic_warmup
        if config.online_steps and not is_online and config.steps < least:
            raise RunError(
                f"--steps must be at least {least:,} to --resume the run in {folder}: it did as many offline"
            )


def defaults(config: RunConfig) -> dict[str, Any]:
    """The default of each setting and hyper-parameter that has one, as it comes back from JSON."""
    fields = (*dataclasses.fields(config), *dataclasses.fields(config.hyper))
    found = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return json.loads(json.dumps(found, default=str))


@contextlib.contextmanager
def lock_folders(folders: Sequence[Path], patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from training in these folders, which are created if they are missing.

    If the process dies, the system releases the locks. Their files stay: if one were deleted, a process that waits for
    it and one that comes later could both hold a lock of that name.

    Args:
        folders: the folders, each once.
        patience: seconds to wait for other processes to leave.

    Raises:
        RunError: another process is in one of them.
    """
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as held:
        for folder in folders:
            create_folder(folder)
            try:
                held.enter_context(FileLock(folder / LOCK).acquire(timeout=max(0.0, deadline - time.monotonic())))
            except Timeout as error:
                raise RunError(f"another process is training in {folder}") from error
        yield


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Create the run's folder and write its settings there."""
    create_folder(folder)
    remove_partial(folder, *LEFT_BY_A_RUN, "config.json", "checkpoints")  # other files may be somebody else's
    for name in ("checkpoints", "tensorboard"):
        remove_partial(folder / name, "*")
    if config.overwrite:
        # The checkpoints go at once: if this is killed, --resume must not go on from some of them.
        if (folder / "checkpoints").exists():
            (folder / "checkpoints").rename(folder / "checkpoints.partial")
            sync_folder(folder)
            remove_partial(folder, "checkpoints")
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_whole(folder / "config.json", json.dumps(config.as_json(), indent=2) + "\n")
