"""The README's promises: its code runs, and its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_code_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(block, names)
    displacement = names["displacement"]
    assert isinstance(displacement, torch.Tensor)
    assert displacement.grad is not None
    assert displacement.grad.isfinite().all()


def test_its_links_and_folders_exist() -> None:
    for target in [
        *re.findall(r"\]\((?!http)([^)#]+)\)", README),
        *re.findall(r"^\| `([\w/]+/)`", README, re.MULTILINE),
    ]:
        assert (REPOSITORY / target).exists(), target


def test_its_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^([a-z-]+ )*{target}( [a-z-]+)*:", makefile, re.MULTILINE), target
