"""Two processes never train in one folder."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.waiting import wait_for_checkpoint
from train.outputs.folder import lock_folders
from train.run import main
from train.settings import RunError

REPOSITORY = Path(__file__).parents[1]
SHORT = (  # noqa: SIM905 (reads as typed)
    "--env hopper-medium --preset quick --device cpu --actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 "
    "--batch-size 32 --flow-warmup 4 --critic-warmup 4 --steps 20 --log-every 4 --eval-every 20 --eval-episodes 2 "
    "--checkpoint-every 4 --dataset-size 2"
).split()


@pytest.mark.usefixtures("datasets")
def test_a_second_process_is_refused_until_the_first_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run = [*SHORT, "--out", str(out)]
    endless = [*run, "--steps", "1000000", "--log-every", "100", "--no-anneal"]
    command = [sys.executable, str(REPOSITORY / "train" / "run.py"), *endless]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_checkpoint(out, first)
        for how in ("--resume", "--overwrite"):
            assert main([*run, "--no-anneal", how]) == 2
            assert f"error: another process is training in {out}" in capsys.readouterr().err
        assert first.poll() is None, "it was disturbed"
        assert any(out.glob("checkpoints/*.safetensors")), "its files were deleted"
        first.kill()
        assert main([*run, "--no-anneal", "--overwrite"], patience=60) == 0
    finally:
        first.kill()
        first.communicate()
    assert (out / "result.json").exists()


@pytest.mark.usefixtures("datasets")
def test_each_seed_of_a_group_is_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_folders([tmp_path / "fidec-seed1"]):
        assert main([*SHORT, "--num-seeds", "2", "--out", str(tmp_path)]) == 2
    assert f"error: another process is training in {tmp_path / 'fidec-seed1'}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}, "a run has begun"
    assert main([*SHORT, "--num-seeds", "2", "--out", str(tmp_path)]) == 0, "a lock is not a stranger's file"


def test_the_lock_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folders([folder]):
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    began = time.monotonic()
    with pytest.raises(RunError, match="another process is training in"), lock_folders([folder], patience=0.3):
        pass
    assert time.monotonic() - began >= 0.3
    threading.Timer(0.3, leave.set).start()
    with lock_folders([folder], patience=60):
        assert leave.is_set()
    thread.join()
