"""compute-sanitizer: kernels touch only their own memory, and no shared memory that is being written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.device import DEVICE

SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))


@pytest.mark.skipif(DEVICE.type != "cuda" or SANITIZER is None, reason="needs a CUDA GPU and compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_values.py", "triton and float32 and penalty and (4x6 or 3x17 or 3x1031)"),
        ("test_flow.py", "test_sizes and ((3 and 29 and 8) or (37 and 0 and 1)) and not gemm and not 1000 and not 70"),
    ],
)
def test_sanitizer(file: str, chosen: str, tool: str, tmp_path: Path) -> None:
    values = Path(__file__).with_name(file)
    suite = [sys.executable, "-m", "pytest", str(values), "-q", "-p", "no:cacheprovider", "-k", chosen]
    log = tmp_path / "log.txt"
    try:
        with log.open("w") as output:
            run = subprocess.run(
                [str(SANITIZER), "--tool", tool, "--error-exitcode", "99", *suite],
                cwd=values.parents[2],
                # each tensor gets memory of its own, whose end can be overrun
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=300,
            )
    finally:  # also if it takes too long
        if "OUT" in os.environ:
            with (Path(os.environ["OUT"]) / "sanitizer.txt").open("a") as together:
                together.write(f"==== {tool} {file}\n{log.read_text()}\n")
    assert run.returncode == 0, log.read_text()[-8000:]
