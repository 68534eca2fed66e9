"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource, sys, torch
from train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        torch.ones(1 << 17)  # too small for a huge page
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is what gives memory back")
def test_memory_is_asked_for_once() -> None:
    def faults(kept: str) -> int:
        # glibc's initial thresholds, fixed, because freed blocks would move them
        fixed = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, "-c", FAULTS, kept]
        others = {"LD_PRELOAD", "GLIBC_TUNABLES"}  # these select another allocator or other thresholds
        env = {name: value for name, value in os.environ.items() if name not in others} | fixed
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return int(run.stdout)

    a_page_each = 100 * (4 << 17) // os.sysconf("SC_PAGE_SIZE")
    if (given_back := faults("give back")) < a_page_each / 10:
        pytest.skip("this kernel gives memory in more than a page at a time, so there are few faults to count")
    assert faults("keep") < given_back / 10
