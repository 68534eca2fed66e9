"""The benchmarks' own promises: wrong contestants are not timed, results are kept, reports match the files."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bars, compare, harness, report, results
from benchmarks.harness import Entry, Race, WrongResult, allocations_at_peak, gate

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "data" / "benchmark.json"


@pytest.fixture
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def save(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


# -- the gate and the race -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ON_GPU", False)


class Benchmark:
    """Stands in for pytest-benchmark's fixture, and counts the calls that it times."""

    disabled = False

    def __init__(self) -> None:
        self.timed = 0
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable, setup: Callable, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            setup()
            target()
            self.timed += 1


def race(contestant: Callable[[int], Any], **options: Any) -> tuple[Benchmark, list[dict[str, Any]]]:
    """Race against doubling; the contestant takes the call's number."""
    benchmark, rows = Benchmark(), []
    entry = Entry(op="double", variant="contestant", sizes={"rows": 4}, calls=3)
    inputs = [torch.arange(4.0) + i for i in range(2)]

    def judge(i: int, outputs: dict[str, Tensor]) -> float:
        return gate(entry, outputs, {"y": 2 * inputs[i].double()})

    def run(i: int) -> dict[str, Tensor]:
        return {"y": contestant(i) * inputs[i % 2]}

    try:
        Race(benchmark, 0.0, rows.append)(entry, run, lambda i: inputs[i % 2] * 2, judge, inputs=2)
    finally:
        race.timed = benchmark.timed  # type: ignore[attr-defined]
    return benchmark, rows


def test_a_right_contestant_is_timed_against_its_baseline() -> None:
    benchmark, (row,) = race(lambda i: 2)
    assert benchmark.timed == row["rounds"] + 1
    assert 0 < row["seconds"]["q25"] <= row["seconds"]["median"] <= row["seconds"]["q75"]
    assert row["speedup"]["median"] > 0
    assert row["relative_error"] == 0
    assert row["peak_memory_bytes"] >= 16
    assert json.loads(json.dumps(row)) == benchmark.extra_info


@pytest.mark.parametrize(
    "factor", [lambda i: 2.001, lambda i: math.nan, lambda i: 2 if i == 0 else 3, lambda i: torch.full((2, 1), 2.0)]
)
def test_a_wrong_contestant_is_never_timed(factor: Callable[[int], Any]) -> None:
    with pytest.raises(WrongResult, match="contestant"):
        race(factor)
    assert race.timed == 0  # type: ignore[attr-defined]


def test_a_contestant_that_goes_wrong_while_timed_leaves_no_row() -> None:
    calls = iter(range(10**9))
    with pytest.raises(WrongResult, match="off by"):
        race(lambda i: 2 if next(calls) < 10 else 3)


def test_from_the_command_line(tmp_path: Path) -> None:
    """A right and a wrong contestant in one run: one row, one failure, and the end lists what was left out."""
    (tmp_path / "test_two.py").write_text(
        """
import pytest, torch
from benchmarks.harness import Entry, gate

@pytest.mark.parametrize("factor", [2, 3])
def test_double(race, factor):
    x = torch.ones(8)
    entry = Entry(op="double", variant=f"times {factor}", sizes={"rows": 8})
    judge = lambda i, out: gate(entry, out, {"y": 2 * x.double()})
    race(entry, lambda i: {"y": factor * x}, lambda i: x + x, judge)

@pytest.mark.long("takes an hour")
def test_long(race): ...
"""
    )
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "benchmarks.conftest", f"--results={file}"]
    command += ["--benchmark-only", "--seconds=0", f"--rootdir={tmp_path}", "-q"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "1 failed, 1 passed, 1 skipped" in run.stdout, run.stdout + run.stderr
    assert "times 3: y is off by 5.0e-01" in run.stdout
    assert "takes an hour: --long includes it: test_long" in run.stdout
    (row,) = results.load(file)["rows"]
    assert row["variant"] == "times 2"
    kept = results.load(file)["runs"][row["run"]]
    assert "takes an hour" in " ".join(kept["not_measured"])
    assert kept["roofs"]["copy_bytes"] > 1e8
    assert kept["versions"]["torch"] == torch.__version__


def test_memory_at_its_peak() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(2**20).fill_(1)  # 4 MiB, freed each time

    assert 2**22 <= allocations_at_peak(run) < 2**23


# -- files of results ------------------------------------------------------------------------------------------------


def a_run(device: str, date: str = "2026-01-01") -> dict[str, Any]:
    return {"device": device, "date": date, "commit": "0123456789abcdef", "not_measured": []}


def test_rates_of_a_moment_ago_serve_again(tmp_path: Path) -> None:
    def another(time: str, **more: Any) -> results.ResultFile:
        run = a_run("H100", f"2026-01-01T{time}+00:00") | {"versions": {"torch": "2"}, "threads": 1} | more
        return results.ResultFile(tmp_path / "bench.json", run)

    first = another("12:00:00", roofs={"copy_bytes": 1e12})
    assert first.recent_roofs() is None
    first.add(a_row("H100"))
    found = another("12:10:00").recent_roofs()
    assert found == {"roofs": {"copy_bytes": 1e12}, "roofs_date": "2026-01-01T12:00:00+00:00"}
    assert another("12:20:00").recent_roofs() is None
    assert another("12:10:00", threads=2).recent_roofs() is None
    another("12:10:00", **found).add(a_row("H100", "theirs"))
    assert another("12:14:00").recent_roofs() == found
    assert another("12:20:00").recent_roofs() is None, "handed on, they are not younger"


def a_row(device: str, label: str = "ours", **more: Any) -> dict[str, Any]:
    return {"op": "penalty", "group": "penalty rows=1", "label": label, "device": device, **more}


def test_results_of_another_device_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.ResultFile(path, a_run("H100")).add(a_row("H100"))
    before = path.read_bytes()
    with pytest.raises(results.ResultError, match="holds results of H100, and this is H200"):
        results.ResultFile(path, a_run("H200"))
    assert path.read_bytes() == before


def test_the_command_line_refuses_another_device(tmp_path: Path, recorded: dict[str, Any]) -> None:
    for part in (*recorded["rows"], *recorded["runs"].values()):
        part["device"] = "somebody else's GPU"
    path = save(tmp_path / "results.json", recorded)
    before = path.read_bytes()
    command = [sys.executable, "-m", "pytest", "benchmarks/test_score.py", "--benchmark-only", f"--results={path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "holds results of somebody else's GPU" in run.stdout + run.stderr
    assert path.read_bytes() == before


def test_a_later_row_replaces_its_like_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = results.ResultFile(path, a_run("H100"))
    first.add(a_row("H100", seconds=1))
    first.add(a_row("H100", "eager", seconds=2))
    second = results.ResultFile(path, a_run("H100", "2026-01-02"))
    second.add(a_row("H100", seconds=3))
    kept = results.load(path)
    assert {(row["label"], row["seconds"]) for row in kept["rows"]} == {("ours", 3), ("eager", 2)}
    assert len(kept["runs"]) == 2
    second.add(a_row("H100", "eager", seconds=4))
    assert list(results.load(path)["runs"]) == [second.run_id], "a run that no row comes from is still listed"


def test_parts_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, device in (("a", "H100"), ("b", "H100"), ("c", "H200")):
        results.ResultFile(tmp_path / f"{name}.json", a_run(device, name)).add(a_row(device, name))
    into = tmp_path / "h100.json"
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert results.main([a, b, "--into", str(into)]) == 0
    assert [row["label"] for row in results.load(into)["rows"]] == ["a", "b"]
    assert results.main([c, "--into", str(into)]) == 2
    assert "c.json holds results of H200, what comes before it of H100" in capsys.readouterr().err
    assert [row["label"] for row in results.load(into)["rows"]] == ["a", "b"]


@pytest.mark.parametrize("content", ["", "{}", '{"runs": {}, "rows": []}', '{"runs": [], "rows": [1]}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(results.ResultError, match=str(path)):
        results.load(path)


# -- report and comparison -------------------------------------------------------------------------------------------


def test_the_report_says_what_the_file_says(tmp_path: Path, recorded: dict[str, Any]) -> None:
    assert report.main([str(RECORDED), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for row in recorded["rows"]:
        section = text.partition(f"## {row['group']}\n")[2].partition("##")[0]
        assert report.spread(row["seconds"], report.duration) in section
        assert f"{row['speedup']['median']:.2f} (" in section
    for run in recorded["runs"].values():
        for fact in (run["command"], run["commit"], run["device"], *run["not_measured"]):
            assert fact in text
    for picture in report.PICTURES:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in text


def test_the_report_of_one_size_has_no_picture_over_sizes(tmp_path: Path, recorded: dict[str, Any]) -> None:
    recorded["rows"] = [row for row in recorded["rows"] if row["op"] == "fisher_penalty"]
    assert report.main([str(save(tmp_path / "one.json", recorded))]) == 0
    assert sorted(path.name for path in (tmp_path / "one-report").iterdir()) == [
        "report.md",
        "roofline.png",
        "speedups.png",
    ]


def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").touch()
    assert report.main([str(RECORDED), "--out", str(file / "report")]) == 2
    assert re.fullmatch(r"error: .*Not a directory: .*\n", capsys.readouterr().err)


def test_the_share_of_the_limit(recorded: dict[str, Any]) -> None:
    row = recorded["rows"][0]
    roofs = recorded["runs"][row["run"]]["roofs"]
    row |= {"bytes": 3 * roofs["copy_bytes"], "flops": 5 * roofs["fp32_flops"], "precision": "fp32"}
    row["seconds"]["median"] = 10.0
    assert report.share_of_limit(recorded, row) == pytest.approx(0.5)
    row["flops"] = None
    assert report.share_of_limit(recorded, row) == pytest.approx(0.3)


def test_a_run_compared_with_itself_has_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(RECORDED), str(RECORDED)]) == 0
    assert "10 compared: 0 faster, 0 slower" in capsys.readouterr().out


def steady(recorded: dict[str, Any], spread: float) -> dict[str, Any]:
    """The same medians with quartiles at that relative distance."""
    for row in recorded["rows"]:
        for kind in ("seconds", "speedup"):
            median = row[kind]["median"]
            row[kind] |= {"q25": median * (1 - spread), "q75": median * (1 + spread)}
    return json.loads(json.dumps(recorded))


def test_a_change_within_the_spread_is_none(recorded: dict[str, Any]) -> None:
    base = steady(recorded, 0.1)
    for row in recorded["rows"]:
        row["speedup"] = {name: 1.15 * value for name, value in row["speedup"].items()}
    assert {change.verdict for change in compare.compare(base, recorded)[0]} == {""}


@pytest.mark.parametrize(("factor", "verdict"), [(1.15, "faster"), (1 / 1.15, "slower")])
def test_a_change_is_noticed(recorded: dict[str, Any], factor: float, verdict: str) -> None:
    base = steady(recorded, 0.03)
    for row in recorded["rows"]:
        if row["label"] == "ours":
            row["seconds"] = {name: value / factor for name, value in row["seconds"].items()}
            row["speedup"] = {name: value * factor for name, value in row["speedup"].items()}
    changes, lonely = compare.compare(base, recorded)
    assert not lonely
    for change in changes:
        assert change.verdict == (verdict if change.label == "ours" else "")
        assert change.time.low <= change.time.median <= change.time.high
        if change.label == "ours":
            assert change.time.median == pytest.approx(factor)


def test_a_slower_machine_is_not_a_slower_contestant(recorded: dict[str, Any]) -> None:
    base = json.loads(json.dumps(recorded))
    for row in recorded["rows"]:
        row["seconds"] = {name: 2 * value for name, value in row["seconds"].items()}
    changes, _ = compare.compare(base, recorded)
    assert [change.verdict for change in changes] == [""] * len(changes)


def test_what_only_one_run_has_is_named(recorded: dict[str, Any]) -> None:
    new = json.loads(json.dumps(recorded))
    gone = new["rows"].pop(0)
    _, lonely = compare.compare(recorded, new)
    assert lonely == [f"only in the saved run: {gone['group']}: {gone['label']}"]


def test_runs_of_two_devices_are_not_compared(
    tmp_path: Path, recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (*recorded["rows"], *recorded["runs"].values()):
        part["device"] = "another"
    assert compare.main([str(RECORDED), str(save(tmp_path / "new.json", recorded))]) == 2
    assert "the new one of another" in capsys.readouterr().err


def test_what_a_gpu_promises_and_keeps(
    recorded: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like, (run,) = recorded["rows"][0], recorded["runs"]
    recorded["runs"][run]["roofs"] = {"copy_bytes": 1e12, "tf32_flops": 1e14, "fp32_flops": 1e13}

    def row(op: str, variant: str, seconds: float, **fields: Any) -> dict[str, Any]:
        sizes = {name: fields.pop(name) for name in list(fields) if name in ("rows", "obs", "K", "d", "states")}
        times = {"seconds": {"median": seconds}, "wall_seconds": {"median": fields.pop("wall", seconds)}}
        own = {"op": op, "variant": variant, "sizes": sizes, "run": run, **times}
        return {**like, "bytes": None, "flops": None, **own, **fields}

    large = {"detail": "forward and backward, GPU time", "timing": "graph"}
    flow = {"rows": 256, "obs": 17, "precision": "tf32"}
    update = {"K": 4, "obs": 17, "detail": "tf32"}
    rows = [
        row("fisher_penalty", "ours", 1e-3, rows=2**20, bytes=0.9e9, **large),
        row("fisher_penalty", "ours", 1e-3, rows=2**18, bytes=0.8e9, **large),
        row("fisher_penalty", "ours", 1e-3, rows=2**18, bytes=0.1e9, **{**large, "detail": "forward, GPU time"}),
        row("integrate_flow", "eager", 9.3e-3, **flow),
        row("integrate_flow", "eager", 4e-3, **flow, timing="graph"),
        row("integrate_flow", "eager, max-autotune", 3e-3, **flow),
        row("integrate_flow", "ours", 1.5e-3, **flow),
        row("integrate_flow", "ours", 0.5e-3, **flow, timing="graph", wall=1e-3),
        row("integrate_flow", "eager", 9e-3, **{**flow, "precision": "bf16"}, timing="graph"),
        row("integrate_flow", "ours", 8e-3, **{**flow, "precision": "bf16"}),
        row("integrate_flow", "ours", 0.5e-3, **{**flow, "rows": 1}, timing="graph"),
        row("integrate_flow", "ours", 2e-3, **{**flow, "rows": 16384}, timing="graph", flops=1.6e11),
        row("fidec update", "ours, captured", 0.8e-3, **update),
        row("fidec update", "ours, captured", 2e-3, **{**update, "K": 8}),
        row("fidec update", "ours, captured", 2e-3, **{**update, "detail": "fp32"}),
        row("fidec update", "JAX", 1.5e-3, **update),
    ]
    path = save(tmp_path / "bench.json", {**recorded, "rows": rows})
    assert bars.main([str(path)]) == 0
    found = {
        bar.promise: ([round(value, 3) for value in bar.measured], bar.verdict) for bar in bars.bars(results.load(path))
    }
    assert found["fisher_penalty, large: share of the copy bandwidth"] == ([0.9, 0.8], "missed")
    assert found["integrate_flow, 256 and 1,536 rows: times eager"] == ([6.2], "kept")
    text = "integrate_flow, 256 and 1,536 rows: times the better of max-autotune and a graph of the loop"
    assert found[text] == ([3.0], "kept"), "by wall time, and only where both rivals were measured"
    assert found["integrate_flow, 16,384 rows: share of the matrix rate"] == ([0.8], "kept")
    assert found["FiDec update: times JAX"] == ([1.875], "missed")
    assert found["FiDec updates per second"] == ([1250.0], "kept")
    assert found["FiDec update: times eager with torch.compile"] == ([], "not measured")
    printed = capsys.readouterr().out
    assert "| fisher_penalty, large: share of the copy bandwidth | 0.85 | 0.8 to 0.9 in 2 cases | missed |" in printed
    assert bars.main([str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("suite", "names"),
    [
        ("penalty", ["fisher_penalty", "eager", "eager, torch.compile", "ours", "forward and backward", ", GPU time"]),
        ("flow", ["integrate_flow", "eager", "eager, max-autotune", "ours"]),
        ("decorator", ["flow_fisher_penalty", "our parts", "ours"]),
        ("update", ["eager, torch.compile", "JAX", "ours, captured", "tf32"]),
        ("seeds", ["eight seeds of fidec, one update each", "ours, one seed alone", "ours, together"]),
    ],
)
def test_the_promises_are_of_what_is_measured(suite: str, names: list[str]) -> None:
    """What is renamed in one place only would leave a promise unmeasured for ever."""
    measured, promised = ((ROOT / "benchmarks" / f"{name}.py").read_text() for name in (f"test_{suite}", "bars"))
    for name in names:
        assert re.search(f"[\"']{re.escape(name)}[\"']", measured), name
        assert name in promised
