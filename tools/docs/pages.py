"""What a page says on the site where a file on GitHub says it otherwise: links, formulas, a program's options.

Pure functions of text, apart from the programs that are asked for their help.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib
import io
import os
import posixpath
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from unittest import mock

import latex2mathml.converter

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tools/README.md": "tools.md",
}
"""Files outside docs/ that are pages of the site, if they exist, and their addresses there."""
WIDTH = 92
"""Characters of a line of help: what fits beside the site's navigation."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"^<!-- help: (.+?) -->$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def page_of(file: str) -> str | None:
    """The site's page or picture for a file of the repository, both by their path; None if it has none."""
    if file in OUTSIDE:
        return OUTSIDE[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else None


def with_site_links(markdown: str, file: str) -> str:
    """The text of a file of the repository with links between pages of the site.

    A link to a file that is no page, such as a program, becomes its text: the project has no public address to link to.
    Links to nothing stay as they are, so that the build refuses them.
    """
    here = posixpath.dirname(page_of(file) or "")

    def rewritten(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return link[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if (ROOT / found).is_dir() and (ROOT / found / "README.md").exists():
            found = f"{found}/README.md"
        if not (ROOT / found).exists():
            return link[0]
        page = page_of(found)
        if page is None:
            return text
        return f"{picture}[{text}]({posixpath.relpath(page, here or '.')}{hash_sign}{anchor})"

    return _outside_code(markdown, lambda text: _LINK.sub(rewritten, text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Change what is not code. A link around code, [`x`](y), is one piece of text with code in it."""
    codes: list[str] = []

    def hidden(code: re.Match[str]) -> str:
        codes.append(code[0])
        return f"\0{len(codes) - 1}\0"

    changed = change(_CODE.sub(hidden, markdown))
    return re.sub("\0(\\d+)\0", lambda mark: codes[int(mark[1])], changed)


def with_help(markdown: str) -> str:
    """``<!-- help: train/run.py -->`` replaced by what the program prints for ``--help``."""
    return _HELP.sub(lambda mark: f"```text\n{help_of(mark[1])}\n```", markdown)


@functools.cache
def help_of(program: str) -> str:
    """What a program of this repository, or a module of it (``-m fdkernels.tune``), prints for ``--help``."""
    name = program.removeprefix("-m ").removesuffix(".py").replace("/", ".")
    main = importlib.import_module(name).main
    out = io.StringIO()
    settings = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(sys, "argv", [program, "--help"]),
        contextlib.redirect_stdout(out),
    ):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{program} --help ended with {end.code}") from end
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    if not text:
        raise RuntimeError(f"{program} --help printed nothing")
    return textwrap.dedent(text)


def with_formulas(page: str) -> str:
    """HTML with MathML in the place of TeX: browsers draw it without a script."""

    def letter(variant: re.Match[str]) -> str:  # browsers ignore mathvariant, and have letters for it
        style = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK"}[variant[1]]
        kind = "CAPITAL" if variant[2].isupper() else "SMALL"
        for name in (f"MATHEMATICAL {style} {kind} {variant[2].upper()}", f"{style} {kind} {variant[2].upper()}"):
            with contextlib.suppress(KeyError):
                return f'<mi mathvariant="normal">{unicodedata.lookup(name)}</mi>'
        raise ValueError(f"no letter for {variant[0]}")

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula[2] == "[" else "inline"
        mathml = latex2mathml.converter.convert(html.unescape(formula[3]).strip(), display=display)
        mathml = re.sub(r'<mi mathvariant="([\w-]+)">(\w)</mi>', letter, mathml)
        mathml = re.sub(r"<mover>(?=<mi>[^<]+</mi><mo>&#x002D9;)", '<mover accent="true">', mathml)  # a dot, not a limit
        mathml = mathml.replace("&#x0007E;", "&#x0223C;")  # ~ as the relation that \\sim is
        return f'<{formula[1]} class="formula">{mathml}</{formula[1]}>'

    return _FORMULA.sub(drawn, page)


def pages_outside() -> Iterator[tuple[str, PurePosixPath]]:
    """Files outside docs/ that are there, with their pages."""
    for file, page in OUTSIDE.items():
        if (ROOT / file).exists():
            yield file, PurePosixPath(page)
