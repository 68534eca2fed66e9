"""The folder of a run: check that it may be used, and write its config.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from train.outputs.checkpoint import newest_step
from train.outputs.files import write_whole
from train.settings import MAY_CHANGE_ON_RESUME, OF_ONLINE, RunConfig, RunError

LEFT_BY_A_RUN = (
    *("config.json", "metrics.csv", "evaluations.csv", "curve.png", "policy.safetensors", "result.json"),
    *("trace.json", "trace.txt", "checkpoints", "tensorboard", "diverged.safetensors"),
)


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise RunError rather than mix two runs in one folder, lose a run, or touch a folder that no run made."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        before = json.loads((folder / "config.json").read_text())
        before |= before.pop("hyper")
        before = defaults(config) | before  # a setting that is newer than the run had its default
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is there and no run made it (no config.json of ours): use another --out") from error
    if not config.resume and not config.overwrite:
        raise RunError(
            f"{folder} already holds a run: --resume continues it, --overwrite deletes it, --out DIR avoids it"
        )
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
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
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


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Create the run's folder and write its settings there."""
    if config.overwrite and not config.resume:
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(config.as_json(), indent=2) + "\n")
