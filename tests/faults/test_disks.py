"""Disks that are full, read-only or gone: a clear error, the newest checkpoint intact, and --resume ends the run."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disk import SmallDisk
from tests.faults.harness import TINY, Command, assert_same_run
from train.loop import Run
from train.outputs.checkpoint import newest_checkpoints
from train.outputs.disk import explain
from train.outputs.files import GrowingFile, write_whole
from train.run import main

pytestmark = pytest.mark.usefixtures("datasets")
MEBIBYTE = 1 << 20
FULL = "the disk is full. Free some space; then --resume goes on from the newest checkpoint"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        disk = SmallDisk(folder, MEBIBYTE)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk with nothing wrong."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happen: Callable[[], object]) -> None:
    """Let something happen before the update that follows ``step``, or before the last files if there is none."""
    parts, finish = Run.parts, Run.finish

    def noted(run: Run, stage: Any) -> Any:
        if run.step == step:
            happen()
        return parts(run, stage)

    def noted_finish(run: Run) -> None:
        if run.step == step:
            happen()
        finish(run)

    monkeypatch.setattr(Run, "parts", noted)
    monkeypatch.setattr(Run, "finish", noted_finish)


def fails(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a run that must fail."""
    assert main([*TINY, "--out", str(out), "--resume"]) == 2
    captured = capsys.readouterr().err
    (line,) = [line for line in captured.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    assert "Traceback" not in captured
    return line


def assert_nothing_is_half_written(out: Path, step: int | None) -> None:
    assert not list(out.rglob("*.partial"))
    (newest,), problems = newest_checkpoints([out / "checkpoints"])
    assert step is None or newest.step == step
    assert not problems
    for table in ("metrics.csv", "evaluations.csv"):
        assert (out / table).read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("step", "leave", "checkpoint"),
    [
        (12, 20_480, 10),  # the next checkpoint takes 36 kB
        pytest.param(15, 90_112, 15, marks=pytest.mark.long("one of many")),  # the next picture takes 150 kB
        (30, 0, 30),  # all that lacks is the policy and the summary
        *(pytest.param(step, 12_288 * n, None, marks=pytest.mark.long("many")) for step in (7, 18) for n in range(5)),
    ],
)
def test_a_full_disk(
    straight: Path,
    disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    leave: int,
    checkpoint: int | None,
) -> None:
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: disk.fill(leave))
        line = fails(out, capsys)
    assert str(out) in line
    assert FULL in line
    assert_nothing_is_half_written(out, checkpoint)
    assert fails(out, capsys).endswith(FULL), "nothing was freed"
    disk.free()
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert_same_run(out, straight)


def test_files_may_not_grow(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quota is reached in the middle of a write; ulimit -f needs no disk of its own."""
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
            line = fails(out, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{out}/checkpoints/step-000000015.safetensors: it would be larger than files may be (ulimit -f)" in line
    assert_nothing_is_half_written(out, 10)
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert_same_run(out, straight)


def test_a_read_only_disk(straight: Path, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    out = disk.folder / "run"
    assert main([*TINY, "--out", str(out), "--steps", "5"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    disk.make_read_only()
    assert f"{out}/config.json: the disk is read-only. Make it writable" in fails(out, capsys)
    assert fails(disk.folder / "new", capsys).startswith(f"error: {disk.folder}/new: the disk is read-only")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    disk.make_writable()
    assert main([*TINY, "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize(
    "how",
    ["moved", *(pytest.param(how, marks=pytest.mark.long("one of three")) for how in ("deleted", "replaced"))],
)
def test_the_folder_is_gone(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def lose() -> None:
        shutil.move(out, elsewhere)
        if how == "replaced":
            shutil.copytree(straight, out)

    with monkeypatch.context() as patch:
        at_step(patch, 12, lose)
        line = fails(out, capsys)
    assert "metrics.csv: it is not there, or its folder was deleted or moved. Put it back" in line
    if how == "replaced":
        assert_same_run(out, straight)  # nothing was written into it
        shutil.rmtree(out)
    assert not out.exists(), "it came back, without most of its files"
    if how != "deleted":
        shutil.move(elsewhere, out)
        assert_nothing_is_half_written(out, 10)
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert_same_run(out, straight)


def test_the_disk_of_the_data_is_full(
    straight: Path, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(disk.folder))
    for leave in (0, 81_920):
        disk.fill(leave)
        line = fails(tmp_path / "run", capsys)
        assert str(disk.folder) in line
        assert "the disk is full. Free some space" in line
        assert not list(disk.folder.rglob("*.hdf5")), "what was not finished holds the space"
        assert not (tmp_path / "run").exists()
        disk.free()
    assert main([*TINY, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.long("two processes")
def test_what_is_printed_does_not_fit(straight: Path, disk: SmallDisk) -> None:
    """``run.py > log 2>&1`` on a disk that fills up: there is no room for an error, but the exit status tells."""
    run = Command(disk.folder / "run", prefix=[sys.executable])
    life = run.start()
    assert life.wait_until(lambda: list(run.out.glob("checkpoints/step-*.safetensors")))
    disk.fill()
    assert life.wait() > 0
    disk.free()
    run.finish()
    assert_same_run(run.out, straight)


def test_a_row_that_does_not_fit_is_taken_back(disk: SmallDisk) -> None:
    file = GrowingFile(disk.folder / "table.csv", b"a,b\n")
    disk.fill()

    def add_many() -> None:
        for _ in range(1000):
            file.add(b"1234567,1234567\n")

    with pytest.raises(OSError, match=r"No space left on device: .*table\.csv"):
        add_many()
    content = (disk.folder / "table.csv").read_bytes()
    assert content.endswith(b"\n")
    assert len(content) % 16 == 4
    disk.free()
    file.add(b"1,2\n")
    file.close()
    assert (disk.folder / "table.csv").read_bytes() == content + b"1,2\n"


def test_a_file_that_does_not_fit_leaves_the_one_before(disk: SmallDisk) -> None:
    path = disk.folder / "config.json"
    write_whole(path, "before")
    disk.fill(8192)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json'$") as info:
        write_whole(path, "x" * 100_000)
    assert explain(info.value, "then again") == f"{path}: the disk is full. Free some space; then again"
    assert path.read_text() == "before"
    assert sorted(p.name for p in disk.folder.iterdir()) == ["ballast", "config.json"]
