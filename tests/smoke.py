"""Try the installed fdkernels: ``python tests/smoke.py``, with the Python of any environment that has it.

Needs nothing but the package and its requirements, and refuses a checkout's. With ``TRITON_INTERPRET=1`` it tries the
kernels too.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fdkernels
import fdkernels.policy  # must not need what training needs
import fdkernels_ref
from fdkernels import backend
from fdkernels.kernels.tuning import table


def check_what_is_installed() -> None:
    for package in (fdkernels, fdkernels_ref):
        folder = Path(package.__file__).parent
        assert folder.is_relative_to(sys.prefix), f"{folder} is not in this environment"
        assert (folder / "py.typed").exists(), f"{folder} has no py.typed"
    assert importlib.metadata.version("fdkernels") == fdkernels.__version__
    assert {"sm_80", "sm_90"} <= table.read(table.SHIPPED_FILE).keys(), "the shipped table is not there"


def run_the_description() -> None:
    """Run the code that a package index shows."""
    description = str(importlib.metadata.metadata("fdkernels").get_payload())
    (block,) = re.findall(r"```python\n(.*?)```", description, re.DOTALL)
    names: dict[str, Tensor] = {}
    exec(block, names)
    gradient = names["displacement"].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.any()


def check_values() -> None:
    """Compare the chain from noise to penalty, and its gradient, with the reference in float64."""
    torch.manual_seed(0)
    flow = fdkernels.VelocityMLP(cond_dim=17, action_dim=6, hidden=(32, 32)).double()
    obs, noise, bridge_noise = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 17), (5, 4, 6), (5, 4, 6)))
    given = {"noise": noise, "bridge_noise": bridge_noise}
    displacement = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    compare(
        lambda: fdkernels.flow_fisher_penalty(flow, obs, displacement, **given),
        lambda: fdkernels_ref.flow_fisher_penalty(flow, obs, displacement, **given),
        displacement,
    )
    if backend.INTERPRETER:
        small = displacement.detach().float().requires_grad_()
        score = torch.randn(5, 4, 6)
        compare(
            lambda: fdkernels.fisher_penalty(small, score, backend="triton"),
            lambda: fdkernels_ref.fisher_penalty(small, score),
            small,
        )


def compare(ours: Callable[[], Tensor], reference: Callable[[], Tensor], displacement: Tensor) -> None:
    results = []
    for function in (ours, reference):
        value = function()
        results.append([value.detach(), *torch.autograd.grad(value.sum(), displacement)])
    torch.testing.assert_close(*results)


if __name__ == "__main__":
    check_what_is_installed()
    run_the_description()
    check_values()
    print(f"fdkernels {fdkernels.__version__} with torch {torch.__version__} works in {sys.prefix}")
