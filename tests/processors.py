"""The choices that other processors would make, as far as this one can run them."""

from __future__ import annotations

import pytest

from fdkernels.cpu import processor

PROCESSORS = ("AMD, AVX-512", "AMD, AVX2", "Intel, AVX-512", "Intel, AVX2")


def run_as(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the library take this processor for one of ``PROCESSORS``."""
    maker, capability = name.split(", ")
    monkeypatch.setattr(processor, "is_amd", lambda: maker == "AMD")
    monkeypatch.setattr(processor, "has_avx512", lambda: capability == "AVX-512")
