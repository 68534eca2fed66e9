"""Runs the kernels' suite under Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/kernels", "-q", "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)  # the inner report, which pytest shows where this fails
    assert run.returncode == 0, f"tests/kernels failed under the interpreter: {run.stdout.strip().splitlines()[-1]}"
