"""Options of the benchmarks, the file of their results, and the list of what a run did not measure."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import ON_GPU, Race, clocks, device_name, roofs
from benchmarks.results import ResultError, ResultFile, describe_run
from train.memory import keep_freed_memory

# --doctest-modules would import the scripts and the peers, whose packages may be missing.
collect_ignore = [str(file) for file in Path(__file__).parent.rglob("*.py") if not file.name.startswith("test_")]

NEEDS_GPU = ("everything on a GPU", "there is no CUDA GPU here; `make gpu` where there is one")
NO_TORCHRL = (
    "TorchRL's own FQL loss",
    "no released version has one (0.14.1 has not); the eager agent is written in its style",
)
_CACHE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
_FILE = pytest.StashKey[ResultFile | None]()
_RUN = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fdkernels' benchmarks")
    group.addoption("--results", type=Path, help="file of results, written row by row; refused if another device's")
    group.addoption("--seconds", type=float, default=1.0, help="to spend on the rounds of each contestant")
    group.addoption("--long", action="store_true", help="include what a run of under ten minutes has no time for")


def pytest_configure(config: pytest.Config) -> None:
    # Compilers start with empty caches, so that a first call takes as long as a new user's.
    cache = config.stash[_CACHE] = tempfile.TemporaryDirectory(prefix="fdkernels-bench-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache.name}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{cache.name}/triton"
    keep_freed_memory()  # as train/run.py does; the same for all contestants, whatever ran before
    run = config.stash[_RUN] = describe_run(device_name(), torch.get_num_threads())
    path = config.getoption("--results")
    try:
        config.stash[_FILE] = ResultFile(path, run) if path else None
    except ResultError as error:
        raise pytest.UsageError(f"--results: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        marker = item.get_closest_marker("long")
        if marker is not None and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason=f"{marker.args[0]}: --long includes it"))


def _turn(item: pytest.Item) -> tuple[object, ...]:
    """When a case has its turn in its file, which is free, because every contestant is timed beside its own baseline.

    A run that is cut short has measured ours in the precision of training, but not what takes long to compile. JAX goes
    last: its threads and memory stay in the process, and slow down later contestants by a tenth.
    """
    case = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    variant, table = str(case.get("variant", "")), str(case.get("table", ""))
    compiles = "compile" in variant or "max-autotune" in variant
    later = {"bf16": 1, "fp32": 2}.get(table, 0)
    return str(item.path), variant == "JAX", compiles, later, not variant.startswith("our")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Race:
    """Checks and times a contestant, see `harness.Race`."""
    config = request.config

    def keep(row: dict[str, Any]) -> None:
        file = config.stash[_FILE]
        if file is not None:
            file.add(row)

    torch.manual_seed(0)
    torch.compiler.reset()  # each contestant compiles afresh, and none reaches the recompilation limit
    if "roofs" not in config.stash[_RUN]:
        file = config.stash[_FILE]
        # a GPU's rates are steady, and measuring them takes seconds of which `make gpu-bench` has few
        recent = file.recent_roofs() if file is not None and ON_GPU else None
        config.stash[_RUN] |= (recent or {"roofs": roofs()}) | {"clocks": clocks()}
    return Race(benchmark, config.getoption("--seconds"), keep)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append((report.nodeid.partition("::")[2], report.longrepr[2].removeprefix("Skipped: ")))


_skipped: list[tuple[str, str]] = []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons: dict[str, list[str]] = {}
    for what, why in [*(() if ON_GPU else (NEEDS_GPU,)), NO_TORCHRL, *_skipped]:
        reasons.setdefault(why, []).append(what)
    unmeasured = [f"{why}: {', '.join(whats)}" for why, whats in reasons.items()]
    terminalreporter.section("not measured in this run", sep="-")
    for line in unmeasured:
        terminalreporter.line(line)
    file = config.stash[_FILE]
    if file is not None and file.run_id in file.results["runs"]:
        file.results["runs"][file.run_id]["not_measured"] = unmeasured
        file.write()
        terminalreporter.line("")
        terminalreporter.line(
            f"results: {file.path}; `python benchmarks/report.py {file.path}` makes tables and pictures"
        )


def pytest_report_header() -> str:
    return f"benchmarks on {device_name()}; torch {torch.__version__}"
