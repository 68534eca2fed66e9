"""The script for time on a GPU: its commands work, and none can take more than its share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu, results
from benchmarks.gpu import PARTS, Step

ROOT = Path(__file__).parents[1]
SUITES = {str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").glob("test_*.py")}


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "WORK", tmp_path / "gpu")
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    return tmp_path / "out"


def test_a_command_that_takes_too_long_costs_only_itself(
    dry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    obeys = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open('{work}/saved', 'w').write('so far')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint(1, flush=True); time.sleep(60)"
    first = Step("fails", 20, ("-c", "raise SystemExit('no such thing')"))
    steps = (
        Step("obeys", 10, ("-c", obeys), keep=("{work}/saved", "{work}/never written")),
        Step("deaf", 6, ("-c", deaf)),
        Step("last", 20, ("-c", "print('done')")),
    )
    monkeypatch.setattr(gpu, "PARTS", {"a": (first,), "b": steps})
    assert gpu.main(["--dry-run", "--out", str(dry)]) == 1
    found = json.loads((dry / "summary.json").read_text())
    assert [(row["part"], row["step"], row["outcome"]) for row in found] == [
        ("a", "fails", "failed"),
        ("b", "obeys", "cut short"),
        ("b", "deaf", "cut short"),
        ("b", "last", "passed"),
    ]
    assert sum(row["seconds"] for row in found[1:]) < 60
    assert (dry / "saved").read_text() == "so far"
    assert "no such thing" in capsys.readouterr().out
    assert "signal.SIG_IGN)" in (dry / "log.txt").read_text()


def test_a_failure_counts_also_where_the_tests_are_cut_short(dry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL)\nprint('{tests}', end='', flush=True)"
    prints += "\ntime.sleep(60)"
    for tests, outcome in (("tests/test_a.py ..F.", "failed"), ("........ [ 12%]\\n...s..", "cut short")):
        monkeypatch.setattr(gpu, "PARTS", {"a": (Step("tests", 6, ("-c", prints.replace("{tests}", tests))),)})
        assert gpu.main(["--dry-run", "--out", str(dry)]) == (outcome == "failed")
        (row,) = json.loads((dry / "summary.json").read_text())
        assert row["outcome"] == outcome


def test_tests_that_all_were_skipped_did_not_pass(dry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_none.py").write_text("import pytest\ndef test_it(): pytest.skip('no such tool')\n")
    (tmp_path / "test_one.py").write_text("import pytest\ndef test_it(): pytest.skip('no')\ndef test_that(): pass\n")
    steps = tuple(Step(name, 20, (*gpu.PYTEST, str(tmp_path / f"test_{name}.py"))) for name in ("none", "one"))
    monkeypatch.setattr(gpu, "PARTS", {"a": steps})
    assert gpu.main(["--dry-run", "--out", str(dry)]) == 0
    assert [row["outcome"] for row in json.loads((dry / "summary.json").read_text())] == ["skipped", "passed"]


def test_a_call_that_is_stopped_or_has_no_time_keeps_what_there_is(dry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = "import time; open('{work}/saved', 'w').write('so far'); time.sleep(60)"
    steps = (
        Step("writes", 60, ("-c", writes), keep=("{work}/saved",)),
        Step("late", 20, ("-c", "import time; time.sleep(60)")),
    )
    monkeypatch.setattr(gpu, "PARTS", {"a": steps})
    assert gpu.main(["--dry-run", "--seconds", "4", "--out", str(dry)]) == 0
    assert (dry / "saved").read_text() == "so far"
    assert [row["outcome"] for row in json.loads((dry / "summary.json").read_text())] == ["cut short", "no time"]
    (dry / "saved").unlink()

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run", lambda *given, run=gpu.run: run(*given) and interrupted())
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--seconds", "4", "--out", str(dry)])
    assert (dry / "saved").exists()
    assert json.loads((dry / "summary.json").read_text())[0]["outcome"] == "stopped"


def test_wheels_that_do_not_fit_cost_only_a_warning(
    dry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "absent-1.0-cp27-cp27m-win32.whl").touch()
    monkeypatch.setattr(gpu, "PARTS", {"a": (Step("last", 20, ("-c", "")),)})
    assert gpu.main(["--dry-run", "--wheels", str(tmp_path / "wheels"), "--out", str(dry)]) == 0
    assert "warning: --wheels: not installed" in capsys.readouterr().err


def test_time_that_is_left_over_goes_to_the_next(dry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (Step("quick", 8, ("-c", "")), Step("slow", 0.5, ("-c", "import time; time.sleep(2)")))
    monkeypatch.setattr(gpu, "PARTS", {"a": steps})
    assert gpu.main(["a", "--dry-run", "--out", str(dry)]) == 0
    assert [row["outcome"] for row in json.loads((dry / "summary.json").read_text())] == ["passed", "passed"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["chekc", "--dry-run"])
    assert "there is no chekc; there are check, tune, bench, train" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "there is no CUDA GPU here; --dry-run shows" in capsys.readouterr().err


def test_calls_fit_into_half_an_hour() -> None:
    seconds = {part: sum(step.seconds for step in steps) for part, steps in PARTS.items()}
    assert max(seconds["check"] + seconds["tune"], seconds["bench"], seconds["train"]) <= 570


def test_no_suite_is_forgotten() -> None:
    assert {argument for step in PARTS["bench"] for argument in step.command} >= SUITES


@pytest.mark.usefixtures("datasets")
@pytest.mark.long("two minutes of small runs")
def test_dry_run(tmp_path: Path) -> None:
    """All commands for a GPU, on the CPU and in small."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-20_000:]
    outcomes = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["step"] for row in outcomes if row["outcome"] != "passed"} <= {"sanitizer", "jax", "seeds"}, done.stdout
    assert {row["outcome"] for row in outcomes} <= {"passed", "skipped"}, done.stdout + log[-20_000:]
    assert [row["step"] for row in outcomes] == [step.name for steps in PARTS.values() for step in steps]
    assert len({row["op"] for row in results.load(tmp_path / "out" / "bench.json")["rows"]}) >= len(SUITES) - 1
    tests = [json.loads(line) for line in (tmp_path / "out" / "tests.jsonl").read_text().splitlines()]
    assert len(tests) == len({test["test"] for test in tests}) > 3
    assert {test["outcome"] for test in tests} <= {"passed", "skipped"}
    with tarfile.open(tmp_path / "out" / "train.tar.gz") as archive:
        names = archive.getnames()
    assert any(name.endswith("seeds0to1.png") for name in names)
    assert not any("checkpoints" in name for name in names)
    assert "updates" in (tmp_path / "out" / "trace.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8
