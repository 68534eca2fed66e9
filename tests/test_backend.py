"""The choice of a backend, without a GPU and without the interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fdkernels
from fdkernels import backend
from tests.judge import with_gradients

ROOT = Path(__file__).parent.parent


def test_triton_on_the_cpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETER", False)
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


def operators() -> Iterator[Callable[..., Tensor]]:
    """Each operator as a function of rows (5, 3) and a backend."""
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8, 8))
    cond = torch.randn(5, 4)
    noise, score, x = torch.randn(3, 5, 2, 3)
    given = {"noise": noise, "bridge_noise": noise}
    yield lambda rows, **asked: fdkernels.fisher_penalty(rows, score, **asked)
    yield lambda rows, **asked: fdkernels.velocity_to_score(rows, x[:, 0], 0.5, **asked)
    yield lambda rows, **asked: fdkernels.velocity_fisher_penalty(rows, score, x, 0.5, **asked)
    yield lambda rows, **asked: fdkernels.flow_fisher_penalty(flow, cond, rows, **given, **asked)
    yield lambda rows, **asked: fdkernels.integrate_flow(flow, rows, cond, differentiable=True, **asked)
    yield lambda rows, **asked: fdkernels.integrate_flow_groups(flow, [rows], [cond], differentiable=True, **asked)[0]


def check_without_triton() -> None:
    for operator in operators():
        rows = torch.randn(5, 3)
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        plain, traced = (with_gradients(function, (rows,)) for function in (operator, compiled))
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)
        assert all(tensor.isfinite().all() and tensor.any() for tensor in plain)
        with torch.no_grad(), pytest.raises(RuntimeError, match="backend='triton' needs the triton package, which is"):
            operator(rows, backend="triton")


def test_everything_but_the_kernels_works_without_triton() -> None:
    """As on macOS and Windows: forward, backward and compiled, in a process that cannot import triton."""
    code = (
        "import sys; sys.modules['triton'] = None; from tests import test_backend; test_backend.check_without_triton()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
