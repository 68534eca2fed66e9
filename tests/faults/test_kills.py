"""A run that is killed at any moment, and resumed, ends as the one that never was killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.harness import LAUNCHER, RUN, TINY, Command, assert_same_group, assert_same_run
from tests.faults.launcher import Fault
from tests.waiting import PATIENCE
from train.outputs.checkpoint import newest_step
from train.outputs.folder import prepare_folder
from train.run import parse

pytestmark = [
    pytest.mark.usefixtures("datasets"),
    pytest.mark.skipif(sys.platform != "linux", reason="the faults are found by the names in /proc"),
]
KINDS: dict[str, tuple[str, ...]] = {
    "one": (*TINY,),
    "seeds": (*TINY, "--num-seeds", "2"),
    "online": (*TINY, "--online-steps", "13"),
    "processes": (*TINY,),
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# In the order in which a run meets them. Each is a life that goes on from what the one before left.
POINTS = {
    "config": Fault("half", "*/config.json.partial"),
    "first evaluation": Fault("half", "*/best-*"),
    "metrics": Fault("row", "*/metrics.csv", 2),
    "checkpoint": Fault("half", "*/checkpoints/step-*", 2),
    "record of what was resumed": Fault("half", "*/metrics.csv.partial"),
    "events of what was resumed": Fault("renamed", "*/tensorboard/*tfevents*"),
    "evaluations": Fault("row", "*/evaluations.csv", 2),
    "nameless checkpoint": Fault("written", "*/checkpoints/step-*"),
    "events": Fault("row", "*/tensorboard/*tfevents*"),
    "picture": Fault("half", "*.png.partial"),
    "new checkpoint": Fault("renamed", "*/checkpoints/step-*", 2),
    "policy": Fault("half", "*/policy.safetensors.partial"),
    "result": Fault("written", "*/result.json.partial"),
}
QUICK = ("metrics", "checkpoint", "events of what was resumed")
OF_PROCESSES = ("metrics", "checkpoint", "evaluations", "new checkpoint")


class Straight(NamedTuple):
    """A run that nobody killed."""

    out: Path
    seconds: float
    """From its first lines, after the imports, to its end."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Straight]:
    """A run of each kind, made when it is first asked for."""

    class Runs(dict[str, Straight]):
        def __missing__(self, kind: str) -> Straight:
            run = command(tmp_path_factory.mktemp("straight") / kind, kind)
            run = dataclasses.replace(run, prefix=run.prefix or [sys.executable])
            life = run.start()
            assert life.wait_until(lambda: "folder " in life.printed), life.printed
            begun = time.monotonic()
            assert life.wait() == 0, life.printed
            self[kind] = Straight(run.out, time.monotonic() - begun)
            return self[kind]

    return Runs()


def command(out: Path, kind: str) -> Command:
    return Command(out, KINDS[kind], prefix=TORCHRUN if kind == "processes" else None)


def assert_same(kind: str, ours: Path, theirs: Straight) -> None:
    (assert_same_group if kind == "seeds" else assert_same_run)(ours, theirs.out)


def test_killed_in_the_middle_of_a_write(straight: Mapping[str, Straight], tmp_path: Path) -> None:
    run = Command(tmp_path / "run", KINDS["one"])
    for name in QUICK:
        run.die_of(POINTS[name])
    run.finish()
    assert_same("one", run.out, straight["one"])


@pytest.mark.long("five lives of two processes")
def test_a_process_is_killed_in_the_middle_of_a_write(straight: Mapping[str, Straight], tmp_path: Path) -> None:
    """Only the first process writes, and so only that one is killed; the other must not live on."""
    run = command(tmp_path / "run", "processes")
    for name in OF_PROCESSES:
        run.die_of(POINTS[name])
    run.finish()
    assert_same("processes", run.out, straight["processes"])


@pytest.mark.long("14 lives of each kind of run")
@pytest.mark.parametrize("kind", ["one", "seeds", "online"])
def test_killed_at_every_point(straight: Mapping[str, Straight], tmp_path: Path, kind: str) -> None:
    run = command(tmp_path / "run", kind)
    for fault in POINTS.values():
        run.die_of(fault)
    run.finish()
    assert_same(kind, run.out, straight[kind])


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("one", 2),
        pytest.param("one", 20, marks=pytest.mark.long("thirty lives")),
        pytest.param("seeds", 6, marks=pytest.mark.long("a dozen lives")),
        pytest.param("online", 6, marks=pytest.mark.long("a dozen lives")),
        pytest.param("processes", 5, marks=pytest.mark.long("eight lives of two processes")),
    ],
)
def test_killed_at_random_moments(straight: Mapping[str, Straight], tmp_path: Path, kind: str, kills: int) -> None:
    """A run is killed again and again until it ends; then comes the next one, until there were that many kills."""
    draw, done = random.Random(kills), 0
    for i in itertools.count():
        run = command(tmp_path / f"run{i}", kind)
        life = run.start()
        while done < kills:
            life.wait_until(lambda life=life: "folder " in life.printed)
            time.sleep(draw.uniform(0, straight[kind].seconds / 2))
            if life.status is not None:
                break
            life.kill()
            done += 1
            life = run.start()
        assert life.wait() == 0, life.printed
        assert_same(kind, run.out, straight[kind])
        if done == kills:
            return


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("begun", "*.partial/data/main_data.hdf5", 2)],
        pytest.param(
            [
                Fault("written", "*.partial/data/main_data.hdf5"),
                Fault("renamed", "*/hopper/medium-2ep-v0"),
            ],
            marks=pytest.mark.long("three lives"),
        ),
    ],
)
def test_killed_while_data_are_generated(
    straight: Mapping[str, Straight], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    run = Command(tmp_path / "run")
    for fault in faults:
        run.die_of(fault)
        folder = "." if fault.at == "renamed" else "*.partial/data"
        assert list((tmp_path / "minari").rglob(f"{folder}/main_data.hdf5")), "nothing was being written"
    run.finish()
    assert_same_run(run.out, straight["one"].out)
    assert not list((tmp_path / "minari").rglob("*.partial"))


@pytest.mark.long("four processes")
def test_killed_while_parts_are_collected(tmp_path: Path) -> None:
    pytest.importorskip("ogbench", reason="OGBench is an extra of this project")

    def collect(folder: Path, fault: Fault | None = None) -> int:
        launcher = [] if fault is None else [str(LAUNCHER), json.dumps(fault)]
        options = ["--env", "pointmaze-medium-stitch", "--episodes", "20", "--workers", "1", "--folder", str(folder)]
        script = str(RUN.with_name("collect.py"))
        return subprocess.run([sys.executable, *launcher, script, *options], timeout=PATIENCE).returncode

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "pointmaze-medium-stitch-v0").iterdir()}

    assert collect(tmp_path / "straight") == 0
    for fault in (Fault("half", "*/part-00000.npz*"), Fault("renamed", "*/part-00000.npz")):
        assert collect(tmp_path / "killed", fault) == -signal.SIGKILL
    assert list(contents(tmp_path / "killed")) == ["part-00000.npz"]
    assert collect(tmp_path / "killed") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_killed_overwrite_leaves_no_checkpoint_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse([*TINY, "--out", str(tmp_path / "run"), "--overwrite"])
    checkpoints = config.checkpoints
    checkpoints.mkdir(parents=True)
    for path in (config.folder / "config.json", *(checkpoints / f"step-{i}.safetensors" for i in (10, 20))):
        path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            prepare_folder(config.folder, config)
    assert newest_step(checkpoints) == 0
    assert (config.folder / "config.json").exists(), "nothing tells that it is a run's folder"
    prepare_folder(config.folder, dataclasses.replace(config, resume=True, overwrite=False))
    assert [path.name for path in config.folder.iterdir()] == ["config.json"]
