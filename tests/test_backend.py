"""The choice of a backend without a GPU and without the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fdkernels
from fdkernels import backend


def test_triton_on_the_cpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETER", False)
    δ, s = torch.ones(5, 6), torch.ones(5, 4, 6)
    for call in (
        lambda: fdkernels.fisher_penalty(δ, s, backend="triton"),
        lambda: fdkernels.velocity_to_score(s, s, 0.5, backend="triton"),
        lambda: fdkernels.velocity_fisher_penalty(δ, s, s, 0.5, backend="triton"),
    ):
        with pytest.raises(RuntimeError, match=r"needs CUDA tensors, or CPU tensors and TRITON_INTERPRET=1 .* got cpu"):
            call()


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="fisher_penalty: backend='triton' needs the triton package"):
        fdkernels.fisher_penalty(torch.ones(5, 6), torch.ones(5, 4, 6), backend="triton")


def test_importing_the_library_does_not_import_triton() -> None:
    code = (
        "import sys, torch; had = 'triton' in sys.modules; import fdkernels; exit(not had and 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
