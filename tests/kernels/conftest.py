"""The kernels' own suite. It runs on a GPU, or with TRITON_INTERPRET=1 set before triton is imported.

Otherwise pytest collects nothing here; ``make test`` runs this suite in its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.kernels.device import DEVICE, INTERPRETED, guarded_memory

if DEVICE.type != "cuda" and not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
else:  # on a GPU each new size takes about a second to compile
    examples = settings().max_examples if INTERPRETED else 10
    settings.register_profile("kernels", max_examples=examples, deadline=None, derandomize=True)
    settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def strict_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that unwritten elements show; accesses outside the arguments fail."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with guarded_memory() if INTERPRETED else contextlib.nullcontext():
        yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header() -> str:
    import triton

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "Triton interpreter on the CPU"
    return (
        f"kernels on: {name}; python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write one line per finished test into $OUT, so that a run that is cut short leaves its results."""
    written_by_another = "PYTEST_XDIST_WORKER" in os.environ
    if "OUT" not in os.environ or written_by_another or (report.when != "call" and report.passed):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.failed:
        line["error"] = str(report.longrepr)[-2000:]
    with (Path(os.environ["OUT"]) / "tests.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
