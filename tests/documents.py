"""The pages of the documentation: their blocks of code, and whether the commands in them could be typed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tomllib
import tyro
from markdown_it import MarkdownIt
from markdown_it.token import Token
from packaging.requirements import InvalidRequirement, Requirement
from torch.distributed.run import get_args_parser

from train import run
from train.environments import resolve

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {
        str(path.relative_to(ROOT))
        for pattern in ("*.md", "docs/**/*.md", "[a-z]*/README.md", "[a-z]*/[a-z]*/README.md")
        for path in ROOT.glob(pattern)
        if path.relative_to(ROOT).parts[0] not in ("runs", "site")
    }
)
STAND_FOR = {"--agent NAME": "--agent fql"}
"""Placeholders that a program would refuse, and something that fits."""
OTHERS = {"git", "jq", "jupyter", "minari", "mypy", "ray", "ruff", "tensorboard"}
"""Programs of others that pages may call; what they make of their arguments is not checked."""
MODULES = {"venv", "http.server", "build"}
"""The same for ``python -m``."""
STUBS = {"python", "python3", "pip", "pytest", "make", "torchrun", *OTHERS}
_INLINE = re.compile(r"(python3?|make|pip install|torchrun|pytest) ")


class Block(NamedTuple):
    page: str
    line: int
    """Of its first line of code, from 1."""
    language: str
    code: str

    @property
    def first(self) -> str:
        """What the lists of exceptions name it by."""
        return self.code.strip().partition("\n")[0]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def parsed(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def tokens(page: str) -> Iterator[Token]:
    """All tokens, inner ones behind their parents."""
    for token in parsed(page):
        yield token
        yield from token.children or ()


def blocks(page: str, *languages: str) -> list[Block]:
    """The page's fenced and indented blocks; of an indented one the language is "". All, unless languages are given."""
    found = []
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            start = (token.map or [0])[0] + (token.type == "fence")
            language = token.info.split(" ")[0] if token.type == "fence" else ""
            found.append(Block(page, start + 1, language, token.content))
    return [block for block in found if not languages or block.language in languages]


def inline_commands(page: str) -> list[Block]:
    """Commands in running text. One without arguments is there to name the program."""
    found, line = [], 0
    for token in parsed(page):
        line = token.map[0] if token.map else line
        for child in token.children or ():
            if child.type == "code_inline" and _INLINE.match(child.content):
                bare = re.fullmatch(r"python3? (\S+\.py)", child.content)
                if bare:
                    assert (ROOT / bare[1]).exists(), f"{page}:{line + 1}: there is no {bare[1]}"
                    continue
                found.append(Block(page, line + 1, "sh", child.content))
    return found


def targets(page: str) -> list[str]:
    """The files that the page links to and shows, as they are written."""
    found = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(page)]
    return [str(target) for target in found if target and not re.match(r"\w+:|#", str(target))]


def run_python(parts: Sequence[Block]) -> dict[str, Any]:
    """Run a page's blocks in their order, in one namespace. An error points to the page's line."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in parts:
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
    return names


# -- commands --------------------------------------------------------------------------------------------------------


def typed(block: Block) -> list[list[str]]:
    """The commands that bash would run, with loops and variables resolved. Programs are replaced by recorders."""
    with tempfile.TemporaryDirectory() as folder:
        work, record = Path(folder, "work"), Path(folder, "record")
        stubs = work / ".venv" / "bin"
        stubs.mkdir(parents=True)
        (stubs / "activate").touch()
        for top in ROOT.iterdir():  # for cd; nothing in them can be changed
            if top.is_dir() and not top.name.startswith("."):
                (work / top.name).mkdir()
        code = functools.reduce(lambda code, pair: code.replace(*pair), STAND_FOR.items(), block.code)
        bash = shutil.which("bash")
        assert bash is not None
        for name in STUBS:
            stub = stubs / name
            # in one write, because the programs of a pipeline run at the same time
            stub.write_text(f'#!{bash}\nprintf "%s\\0" "${{0##*/}}" "$@" "\036" >> {record}\n')
            stub.chmod(0o755)
        ran = subprocess.run(
            [bash, "-eu", "-c", code], cwd=work, env={"PATH": str(stubs)}, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, f"{block.where}: bash: {ran.stderr.strip()}"
        recorded = record.read_text() if record.exists() else ""
    return [command.split("\0")[:-1] for command in recorded.split("\036\0")[:-1]]


def check_block(block: Block) -> None:
    """Check every command in it.

    Raises:
        AssertionError, ValueError, SystemExit: one of them would be refused.
    """
    for command in typed(block):
        check(command, block.where)


class Parsed(BaseException):
    """A program has read its options; it must not go on."""

    def __init__(self, options: Any) -> None:
        self.options = options


def check(command: Sequence[str], where: str) -> None:
    """Check that the program exists and would accept these arguments."""
    name, *args = command
    if name == "make":
        ran = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, f"{where}: make {' '.join(args)}: {ran.stderr.strip()}"
    elif name == "pip":
        _check_pip(args, where)
    elif name == "pytest":
        _check_paths([arg for arg in args if arg.startswith("tests")], where)
    elif name == "torchrun":
        options = get_args_parser().parse_args(args)
        _check_program(options.training_script, options.training_script_args, where)
    elif name in ("python", "python3"):
        _check_python(args, where)


def _check_python(args: Sequence[str], where: str) -> None:
    assert args, f"{where}: python alone waits for input"
    first, *rest = args
    if first == "-c":
        compile(rest[0], where, "exec")
    elif first != "-m":
        _check_program(first, rest, where)
    elif rest[0] in ("pip", "pytest"):
        check(rest, where)
    elif rest[0] not in MODULES:
        _check_program(rest[0].replace(".", "/") + ".py", rest[1:], where)


def _check_program(script: str, args: Sequence[str], where: str) -> None:
    """Check a program of ours, with its own parser."""
    _check_paths([script], where)
    source = (ROOT / script).read_text()
    if not re.search("tyro|argparse|parse", source):
        assert not args, f"{where}: {script} takes no options, got {args}"
        return
    real_cli, real_parse, said = tyro.cli, argparse.ArgumentParser.parse_args, io.StringIO()

    def cli(*given: Any, **named: Any) -> None:
        raise Parsed(real_cli(*given, **named))

    def parse_args(*given: Any, **named: Any) -> None:
        raise Parsed(real_parse(*given, **named))

    with (
        mock.patch.object(sys, "argv", [script, *args]),
        mock.patch.object(tyro, "cli", cli),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            raise AssertionError(f"{where}: {script} read no options")
        except Parsed as parsed:
            options = parsed.options
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{where}: {script} {' '.join(args)}: {said.getvalue().strip()}") from None
            return  # --help
    envs = getattr(options, "envs", None) or [getattr(options, "env", None)]
    for env in envs:
        if isinstance(env, str) and env != "..." and script != "train/collect.py":  # which has other names
            resolve(env)
    if "--" in args:  # options of every run
        run.parse(["--env", envs[0], *args[args.index("--") + 1 :]])


def _check_paths(paths: Sequence[str], where: str) -> None:
    for path in paths:
        assert (ROOT / path.partition("::")[0]).exists(), f"{where}: there is no {path}"


def _check_pip(args: Sequence[str], where: str) -> None:
    """Check that the extras exist of what would be installed from here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for arg in args:
        here = re.fullmatch(r"(?:\.|fdkernels|\S+\.whl)\[([\w,-]+)\]", arg)
        if here:
            missing = set(here[1].split(",")) - set(extras)
            assert not missing, f"{where}: pip {' '.join(args)}: no extra {', '.join(missing)}"
        elif not arg.startswith("-") and not re.search(r"[./]|^install$", arg):
            with contextlib.suppress(InvalidRequirement):
                Requirement(arg)
                continue
            raise AssertionError(f"{where}: pip cannot read {arg!r}")
