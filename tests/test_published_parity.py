"""Our agents match the published ones in every recorded number of the cases in ``--golden-dir``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.published import Replay, mismatches, numeric_keys, spoiled

Case = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    with np.load(golden) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def exact(case: Case) -> dict[str, Tensor]:
    return Replay(case, torch.float64).results


def test_matches_the_published_agent(case: Case, exact: dict[str, Tensor]) -> None:
    problems = mismatches(case, exact, torch.float64)
    assert not problems, "\n".join(problems)


def test_matches_the_published_agent_in_float32(case: Case, exact: dict[str, Tensor]) -> None:
    problems = mismatches(case, Replay(case, torch.float32).results, torch.float32, exact=exact)
    assert not problems, "\n".join(problems)


def test_matches_when_compiled(case: Case) -> None:
    problems = mismatches(case, Replay(case, torch.float64, "compiled").results, torch.float64)
    assert not problems, "\n".join(problems)


def test_a_spoiled_output_is_noticed(case: Case, exact: dict[str, Tensor]) -> None:
    inputs = "(?!init/|opt/|batch/|rand/|eval/.*(obs|noise))"
    for dtype, outputs in ((torch.float64, "x64/"), (torch.float32, f"(?!x64/){inputs}")):
        results = Replay(case, dtype).results
        for key in numeric_keys(case, outputs):
            problems = mismatches(spoiled(case, key), results, dtype, exact=exact, only=key)
            assert problems, f"{key} off by 0.1 % went unnoticed"
    for key in numeric_keys(case, outputs):  # of the last update, in float32
        wrong = {key: 1.01 * results[key]}
        problems = mismatches(case, wrong, torch.float32, exact=exact, only=key)
        assert problems, f"ours off by 1 % in {key} went unnoticed"


def test_a_spoiled_input_is_noticed(case: Case) -> None:
    # change whole arrays: a single number may have no effect, such as noise whose action is clipped anyway
    for key in numeric_keys(
        case, "batch/|rand/(?!t_fisher)|init/.*(Dense_1|log_alpha)|opt/nu/modules_critic/.*Dense_1"
    ):
        results = Replay(spoiled(case, key, whole=True), torch.float64).results
        assert mismatches(case, results, torch.float64), f"{key} off by 0.1 % went unnoticed"
