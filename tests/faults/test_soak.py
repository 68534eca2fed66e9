"""A run needs no more memory, open files, threads or disk the longer it goes on: two minutes of `soak.py`'s hour."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.soak import Sample, problems, report, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's /proc")


@pytest.mark.long("two minutes")
@pytest.mark.usefixtures("datasets")
def test_two_minutes(tmp_path: Path) -> None:
    samples = soak(tmp_path / "run", minutes=2, every=1)
    assert samples[-1].steps > 200
    assert problems(samples) == [], report(samples)


def test_growth_is_noticed() -> None:
    flat = [Sample(float(i), 10 * i, 500.0 + i % 2, 20, 9, 3.0) for i in range(100)]
    assert problems(flat) == []
    for name, step in (("rss", 0.5), ("files", 0.1), ("threads", 0.1), ("disk", 0.01)):
        growing = [sample._replace(**{name: getattr(sample, name) + i * step}) for i, sample in enumerate(flat)]
        (problem,) = problems(growing)
        assert problem.startswith(f"{name} grew from")
