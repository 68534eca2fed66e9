from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # set before torch counts the cores
    # of a machine, this process may have only some
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # not part of the key of PyTorch's cache of compiled code
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{capability}-{getuser()}")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; so it would be for what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

DATA = Path(__file__).parent / "data"
settings.register_profile("whole", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("quick", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("whole")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=DATA,
        help="folder of recorded cases of the published agents (*.npz); default: those in tests/data",
    )


def pytest_report_header() -> str:
    """Versions and settings that a run's numbers depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden_dir")
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise pytest.UsageError(f"--golden-dir: no .npz file in {folder}")
        metafunc.parametrize("golden", files, ids=lambda f: f.stem, scope="module")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder of generated data for all runs; the first one that needs it makes it. Nothing is downloaded."""
    import huggingface_hub.constants

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by all workers; the one that generates holds a lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        patch.setenv("HF_HUB_OFFLINE", "1")  # for runs in their own process
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # for runs in this one
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
