"""Which sequences of launches are recorded and which are dropped; recording itself needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fdkernels.kernels.flow import graphs


@pytest.fixture(autouse=True)
def none_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_recordings", type(graphs._recordings)())


def test_the_second_call_is_recorded_and_the_third_is_not() -> None:
    recorded: list[Any] = []

    def record() -> Any:
        recorded.append(object())
        return recorded[-1]

    assert graphs._remembered("a", record) is None
    assert recorded == []
    assert graphs._remembered("b", record) is None
    first = graphs._remembered("a", record)
    assert recorded == [first]
    assert graphs._remembered("a", record) is first
    assert len(recorded) == 1


def test_what_was_not_called_for_longest_is_forgotten() -> None:
    record: Any = object
    for _ in range(2):
        graphs._remembered("kept", record)
    kept = graphs._remembered("kept", record)
    for i in range(3 * graphs.MAX_RECORDINGS):
        graphs._remembered(i, record)
        assert graphs._remembered("kept", record) is kept
    assert len(graphs._recordings) == graphs.MAX_RECORDINGS
    assert graphs._remembered(0, record) is None


def test_on_the_cpu_nothing_is_recorded() -> None:
    double = lambda inputs, parameters, factor: (inputs[0] * factor + parameters[0],)  # noqa: E731
    for _ in range(3):
        (out,) = graphs.replayed(double, (torch.ones(2),), [torch.ones(2)], 3)
        assert out.tolist() == [4.0, 4.0]
    assert not graphs._recordings
