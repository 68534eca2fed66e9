"""What commands print and how they end: ``--quiet``, ``--json`` and errors, alike for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import tyro

from train.exits import Exit
from train.options import Group
from train.outputs.disk import explain
from train.progress import no_progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Group):
    """What is printed."""

    title = "output"

    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result and errors only: no settings, no progress."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result as one line of JSON, the only line on stdout; all else goes to stderr. The object has
    "exit_code", and "error" if there was one."""


class Ending(NamedTuple):
    """How a command's work ended."""

    text: str
    """The result for people."""
    document: Mapping[str, Any]
    """The result for ``--json``; if the command was stopped, with what is to be said of it as "error"."""
    code: Exit = Exit.DONE
    problems: Sequence[str] = ()
    """Errors that did not keep it from a result."""


@contextlib.contextmanager
def _speaking(output: Output) -> Iterator[None]:
    """Inside, prints and progress go where the options say."""
    with contextlib.ExitStack() as stack:
        if output.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(no_progress())
        elif output.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def conclude(
    work: Callable[[], Ending], output: Output, refusals: tuple[type[Exception], ...], again: str = "", who: str = ""
) -> int:
    """Do a command's work, print its result or what went wrong, and return the exit code.

    Args:
        work: the work; what it prints is neither result nor error.
        output: how to print.
        refusals: errors that users can do something about, which are shown without a traceback. Their ``exit_code``,
            if they have one, is that of the command.
        again: what happens when the command is given again after an error; empty if there is nothing to go on with.
        who: which process this is, if there are several.
    """
    try:
        with _speaking(output):
            ending = work()
    except BrokenPipeError:
        if again:
            print(f"stopped: nothing reads the output any more; {again}", file=sys.stderr)
        raise
    except refusals as error:
        message = explain(error, f"then {again}") if again else str(error)
        ending = Ending("", {"error": message}, getattr(error, "exit_code", Exit.REFUSED), [message])
    except KeyboardInterrupt:
        message = f"stopped; {again}" if again else "stopped"
        ending = Ending("", {"error": message}, Exit.STOPPED)
    except Exception as error:  # the traceback comes from Python
        if output.json:
            _print_json({"error": f"{type(error).__name__}: {error}"}, Exit.FAILED)
        raise
    if output.json:
        _print_json(ending.document, ending.code)
    elif ending.text:
        print(ending.text.lstrip("\n") if output.quiet else ending.text)
    if ending.code == Exit.STOPPED and "error" in ending.document:
        print(ending.document["error"], file=sys.stderr)
    for problem in ending.problems:
        print(f"error{who}: {problem}", file=sys.stderr)
    return ending.code


def _print_json(document: Mapping[str, Any], code: Exit) -> None:
    print(json.dumps({**document, "exit_code": code}, default=str), flush=True)


def _stop_at_sigterm() -> None:
    """From here on SIGTERM stops this process as Ctrl-C does, and a second one ends it at once."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends processes that wait in C++, where Python cannot stop them
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        return

    command = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        if os.getpid() == command:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signum)  # a worker process that has just been forked

    signal.signal(signal.SIGTERM, stop)
    # not in worker processes, which this one ends by that signal
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def start(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process, and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # "δ" must not stop a run, and who reads a pipe wants lines at once
            stream.reconfigure(errors="replace", line_buffering=True)
    _stop_at_sigterm()
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # before `conclude`
        print("stopped", file=sys.stderr)
        if "--json" in sys.argv:
            _print_json({"error": "stopped"}, Exit.STOPPED)
        code = Exit.STOPPED
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # Python flushes both at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = Exit.UNREAD
    sys.exit(code)
