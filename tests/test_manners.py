"""How commands speak: help, --quiet, --json, exit codes, colours and progress."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train import play, progress, run
from train.exits import Exit
from train.outputs import console
from train.outputs.console import Ending, Output
from train.presets import PRESETS, preset_config
from train.settings import RunConfig, RunDiverged, RunError
from train.signals import handle_stops

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *(f"train.{name}" for name in ("run", "compare", "sweep", "play", "collect", "diverged", "environments")),
    *(f"benchmarks.{name}" for name in ("report", "compare", "science", "gpu")),
    "fdkernels.tune",
]


def help_of(command: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(command).parse([*options, "--help"])
    assert end.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return re.sub("[╭│╰─╮╯]", " ", captured.out)  # tyro draws boxes only where it sees UTF-8


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_eighty_columns_and_ends_with_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(command, capsys)
    typed = "python -m fdkernels.tune" if command == "fdkernels.tune" else f"python {command.replace('.', '/')}.py"
    assert text.startswith(f"usage: {typed} ")
    options, _, ending = text.partition("examples:")
    assert ending.count(typed) >= 1
    assert "exit codes: 0 done, 1 " in ending
    wide = [line for line in options.splitlines() if len(line) > 80 and not line.startswith(("usage:", "    "))]
    assert wide == []
    assert "\x1b" not in text, "colours where there is no terminal"
    if command not in ("benchmarks.gpu", "fdkernels.tune"):
        assert re.search("^ +--quiet ", text, re.MULTILINE)
        assert re.search("^ +--json ", text, re.MULTILINE)


def test_help_of_a_run_is_grouped_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train.run", capsys, "--preset", "full", "--env", "hopper-medium")
    titles = re.findall("^ +([a-z ]+) options +$", text, re.MULTILINE)
    assert titles[:3] == ["schedule", "data", "acting and evaluation"]
    assert {"online", "algorithm", "hardware", "folder", "output"} <= set(titles)
    config = preset_config("full", "fidec", "hopper-medium")
    for field in (*dataclasses.fields(config), *dataclasses.fields(config.hyper)):
        flag = f"--{field.name.replace('_', '-')}"
        assert field.name == "hyper" or re.search(f"^ +{flag}[ ,]", text, re.MULTILINE), flag


def test_help_shows_what_presets_differ_in(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train.run", capsys, "--agent", "fql", "--preset", "full")
    assert "Updates of the agent, after the warm-ups. (default: 1000000)" in " ".join(text.split())
    table = text.partition("Presets differ in these:")[2]
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith("  --")}
    steps = [preset_config(preset, "fql", None).steps for preset in PRESETS]
    assert lines["--steps"] == [f"{n:_}" for n in steps]
    assert "--batch-size" not in lines, "all have the same"


def test_colours_need_terminals_and_may_be_forbidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def coloured(**variables: str) -> bool:
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            for name, value in ({"TERM": "xterm"} | variables).items():
                patch.setenv(name, value)
            for stream in (sys.stdout, sys.stderr):
                patch.setattr(stream, "isatty", lambda: True, raising=False)
            return "\x1b" in help_of("train.play", capsys)

    assert coloured()
    assert not coloured(NO_COLOR="1")
    assert not coloured(TERM="dumb")


def test_groups_change_neither_settings_nor_files() -> None:
    config = run.parse(["--env", "hopper-medium", "--lr", "0.5", "--eval_every", "7", "--quiet", "--json", "--steps=9"])
    assert (config.hyper.lr, config.eval_every, config.steps, config.quiet, config.json) == (0.5, 7, 9, True, True)
    saved = config.as_json()
    assert list(saved)[:2] == ["env", "agent"]
    assert {"quiet", "json"}.isdisjoint(saved)
    assert saved["hyper"]["lr"] == 0.5
    assert saved.keys() == {field.name for field in dataclasses.fields(RunConfig)} - {"quiet", "json"}


# -- results and errors ------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], Ending]:
    def work() -> Ending:
        print("working")
        raise error

    return work


def working() -> Ending:
    print("working")
    return Ending("\nthe table", {"score": 3.5, "folder": Path("runs")}, Exit.DIVERGED, ["one seed diverged"])


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_said_where(quiet: bool, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.conclude(working, Output(quiet=quiet, json=as_json), ()) == 3
    out, err = capsys.readouterr()
    if as_json:
        assert json.loads(out) == {"score": 3.5, "folder": "runs", "exit_code": 3}
        assert out.count("\n") == 1
    else:
        assert out == ("the table\n" if quiet else "working\n\nthe table\n")
    said = "working\n" if as_json and not quiet else ""
    assert err == f"{said}error: one seed diverged\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("no such thing"), Exit.REFUSED, "no such thing"),
        (RunDiverged("NaN"), Exit.DIVERGED, "NaN"),
        (KeyboardInterrupt(), Exit.STOPPED, "stopped; --resume goes on"),
    ],
)
def test_errors_have_a_code_and_a_message(
    error: BaseException, code: Exit, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Output(json=True, quiet=True)
    assert console.conclude(raising(error), asked, (RunError,), "--resume goes on", who=" (process 1)") == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": message, "exit_code": code}
    assert err == (f"{message}\n" if code == Exit.STOPPED else f"error (process 1): {message}\n")


def test_a_crash_is_told_and_not_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        console.conclude(raising(ZeroDivisionError("by zero")), Output(json=True), (RunError,))
    last = capsys.readouterr().out
    assert json.loads(last) == {"error": "ZeroDivisionError: by zero", "exit_code": 1}


def test_bad_options_are_told_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--steps", "0"], ["--bogus"], ["--preset"], ["--device"], ["--agent"], ["--online-steps"]):
        with pytest.raises(SystemExit) as end:
            run.main(["--env", "hopper-medium", "--json", *options])
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert json.loads(out) == {"error": "an option is unknown or has a bad value, see stderr", "exit_code": 2}
        assert options[0] in err
        assert "usage:" not in err, "of a parser that knows only some options"
    assert run.main(["--env", "hoper-medium", "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert "Nearest: hopper-medium" in error
    assert err == f"error: {error}\n"


SCRIPT = """
import sys
from train.outputs import console
from train.outputs.console import Ending, Output

def work():
    if "interrupt" in sys.argv:
        raise KeyboardInterrupt
    for i in range(100_000):
        print(f"line {i}, δ")
    return Ending("the end", {})

console.start(lambda: console.conclude(work, Output(), (OSError,), "--resume goes on"))
"""


def test_a_reader_that_has_gone_is_no_error() -> None:
    """Nor is a terminal that cannot show δ."""
    command = f'"{sys.executable}" -c "$SCRIPT" | head -1; echo ${{PIPESTATUS[0]}}'
    environment = {"SCRIPT": SCRIPT, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "line 0, ?\n141\n"
    assert done.stderr == "stopped: nothing reads the output any more; --resume goes on\n"


INTERRUPTED = """
import multiprocessing, sys, time
from train.outputs import console
from train.outputs.console import Ending, Output

def wait():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

def work():
    context = multiprocessing.get_context("fork")
    going = context.Event()
    worker = context.Process(target=lambda: (going.wait(), wait()))
    worker.start()
    try:
        going.set()
        worker.join()
    finally:
        worker.terminate()
        worker.join()
        print("worker", worker.exitcode)

working = lambda: console.conclude(work, Output(json=True), (), "the same command goes on")
console.start(working if "work" in sys.argv else wait)
"""


@pytest.mark.parametrize(
    ("where", "message", "said"),
    [
        ("options", "stopped", ""),
        ("work", "stopped; the same command goes on", f"worker {-signal.SIGTERM}\n"),
    ],
)
def test_sigterm_stops_every_command_in_good_order(where: str, message: str, said: str) -> None:
    """Worker processes still end by it."""
    command = [sys.executable, "-c", INTERRUPTED, "--json", where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert json.loads(out) == {"error": message, "exit_code": 130}
    assert err == f"{said}{message}\n"


def test_what_was_to_be_ignored_stays_ignored() -> None:
    """A shell script starts ``run.py &`` with SIGINT ignored: Ctrl-C is for the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        replaced = handle_stops(lambda signum, frame: None)
        try:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert list(replaced) == [signal.SIGTERM]
        finally:
            signal.signal(signal.SIGTERM, replaced[signal.SIGTERM])
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "commands" / "exit-codes.md").read_text()
    for code in Exit:
        assert f"| {code.value} | {code.name.lower()} | " in text


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(progress.bar(range(1000), desc="flow", unit="update"))
    assert capsys.readouterr().err == "", "it took less than a minute"
    monkeypatch.setattr(progress, "SELDOM", 0.0)
    for _ in (shown := progress.bar(range(3), desc="flow", unit="update")):
        shown.set_postfix_str("td=1", refresh=False)
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert lines[0].startswith("flow: 0 of 3 updates, 00:00 so far")
    assert re.fullmatch(r"flow: 3 of 3 updates, 00:00 so far, about 00:00 left, .*update/s, td=1", lines[-1])
    with progress.no_progress():
        list(progress.bar(range(3), desc="flow", unit="update"))
    list(progress.bar(range(3), desc="flow", unit="update", shown=False))
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(progress.bar(range(3), desc="flow", unit="update"))
    assert "\rflow: 100%|" in terminal.getvalue()


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.long("a run in its own process, and its policy played")
def test_a_run_for_scripts(datasets: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.test_run import TINY

    out = tmp_path / "run"
    few = ["--eval-episodes", "1", "--interim-episodes", "1", "--acting", "sample"]
    command = [sys.executable, "-W", "default", "train/run.py", *TINY, *few, "--out", str(out), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stderr == "", "no warnings of dependencies either"
    result: dict[str, Any] = json.loads(done.stdout)
    assert result.pop("exit_code") == done.returncode == 0
    assert result == json.loads((out / "result.json").read_text())

    assert play.main([str(out), "--episodes", "2", "--json"]) == 0
    printed = capsys.readouterr()
    played = json.loads(printed.out)
    scores = [episode["score"] for episode in played["episodes"]]
    assert played["score_mean"] == pytest.approx(sum(scores) / 2)
    assert "episode" in printed.err
    assert play.main([str(out), "--episodes", "2", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    assert f"score {played['score_mean']:.1f}" in printed.out
