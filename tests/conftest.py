from __future__ import annotations

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=DATA,
        help="folder of recorded cases of the published agents (*.npz); default: those in tests/data",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden_dir")
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise pytest.UsageError(f"--golden-dir: no .npz file in {folder}")
        metafunc.parametrize("golden", files, ids=lambda f: f.stem, scope="module")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
