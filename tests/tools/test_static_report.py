"""The kernels compiled ahead of time: nothing spills, loads are 128 bits wide, products use tensor cores."""

from __future__ import annotations

import json
import os

import pytest
import torch
import triton

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

from fdkernels.kernels.oldest_triton import IS_OLDEST
from tools import static_report

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}  # available to one program
long = pytest.mark.long("half a minute of compilation, and the other tests have no use for it")


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param("sm_80", torch.float32, marks=long),
        pytest.param("sm_80", torch.bfloat16, marks=long),
        pytest.param("sm_90", torch.float32, marks=long),
        ("sm_90", torch.bfloat16),  # not long, because the emulator's tests compile most of these anyway
    ],
    ids=str,
)
def test_no_spills_and_wide_loads(architecture: str, dtype: torch.dtype) -> None:
    rows = list(static_report.report([architecture], [dtype]))
    flows = [row for row in rows if "case" in row]
    expected = {"streamed", "gemm"} if architecture == "sm_80" else {"streamed", "stationary", "gemm"}
    assert {row["case"]["implementation"] for row in flows} == expected
    fast = [row for row in rows if row.get("case", {"shipped": True})["shipped"]]
    wide = rows
    # tiles were chosen with 3.7; older compilers run a few registers short in the largest on sm_90
    allowed = 32 if architecture == "sm_90" and TRITON < (3, 7) else 0
    if IS_OLDEST:  # it spills more on sm_90 and in long rows, and only reads rows flat that vectors divide
        fast = [row for row in fast if row["arch"] == "sm_80" and row["d"] < 1000]
        wide = [row for row in rows if row["d"] % 8 == 0 or "case" in row]
    # what a Jacobian needs beside the products, the assembler may put on the stack, so that two programs run at once
    jacobians = [row for row in flows if row["kernel"].startswith("jacobian")]
    assert jacobians
    assert [row for row in fast if row not in jacobians and row["spilled_bytes"] > allowed] == []
    assert [row for row in fast if row in jacobians and row["spilled_bytes"] > 160] == []
    assert [row for row in wide if row["widest_load_bits"] != 128] == []
    assert [row for row in flows if not row["mma"]] == []
    assert [row for row in rows if row["shared_bytes"] > SHARED_BYTES[architecture]] == []


@pytest.mark.parametrize("json_asked_for", [False, True])
def test_the_command(json_asked_for: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On one shape of the kernels without products, which compile quickly."""
    monkeypatch.setattr(static_report, "SHAPES", [(4, 6)])
    monkeypatch.setattr(static_report, "flow_cases", lambda *_: [])
    static_report.main([*(["--json"] if json_asked_for else []), "--arch", "sm_90", "--dtype", "fp32"])
    printed = capsys.readouterr().out
    if json_asked_for:
        kernels = [row["kernel"] for row in json.loads(printed)]
    else:
        head, *lines = printed.splitlines()
        assert " ".join(head.split()) == "kernel arch dtype K d regs spilled shared load mma config"
        kernels = [line.split()[0] for line in lines]
    assert kernels == [name for name, *_ in static_report.calls(torch.float32, 4, 6)]
