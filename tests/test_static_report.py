"""The kernels as compiled ahead of time: nothing spills, loads are 128 bits wide, products are the tensor cores'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}  # that one program may have


def test_no_spills_and_wide_loads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "benchmarks/static_report.py",
        "--json",
        "--arch",
        "sm_80",
        "sm_90",
        "--dtype",
        "fp32",
        "bf16",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert [row for row in rows if row["spills"] and row.get("case", {"shipped": True})["shipped"]] == []
    assert [row for row in rows if row["widest_load_bits"] != 128] == []
    flows = [row for row in rows if "case" in row]
    assert {row["case"]["implementation"] for row in flows} == {"streamed", "stationary", "gemm"}
    assert [row for row in flows if not row["mma"]] == []
    assert [row for row in rows if row["shared_bytes"] > SHARED_BYTES[row["arch"]]] == []
