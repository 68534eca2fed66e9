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
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import latex2mathml.converter

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tools/README.md": "tools.md",
}
"""Files outside docs/ that are pages of the site, and their addresses there."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_OPTIONS = re.compile(r"^<!-- options: (.+?) -->$", re.MULTILINE)
_BOX = re.compile(r"^╭─ (.*?) ─*╮\n((?:│.*│\n)+)╰", re.MULTILINE)
_CHOICES = re.compile(r"(--[\w-]+) \[?\{([^{}]*,[^{}]*)\}(.*\.\.\..*)?")
_SECTION = re.compile(r"^((?!examples)[^\n:]+):\n((?:  .*\n|\n)+)", re.MULTILINE)
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


def with_options(markdown: str) -> str:
    """``<!-- options: train/run.py -->`` replaced by tables of what the program lists for ``--help``."""

    def listed(mark: re.Match[str]) -> str:
        text = help_of(mark[1])
        return "\n".join([*tables_of(options_of(text)), *notes_of(text)])

    return _OPTIONS.sub(listed, markdown)


@functools.cache
def help_of(program: str) -> str:
    """What a program of this repository, or a module of it (``-m fdkernels.tune``), prints for ``--help``."""
    name = program.removeprefix("-m ").removesuffix(".py").replace("/", ".")
    main = importlib.import_module(name).main
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    settings = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}  # from 130 on, tyro puts boxes side by side
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
    out.seek(0)
    return out.read()


class Options(NamedTuple):
    """A group of options, as ``--help`` shows them."""

    title: str
    note: str
    rows: list[tuple[str, str]]
    """How an option is typed, and what it means."""


def options_of(text: str) -> list[Options]:
    """The groups in a help text of tyro, which frames them, or of argparse, which indents them.

    Raises:
        ValueError: there are none.
    """
    found = [_group(box[1], [line[2:-1] for line in box[2].splitlines()]) for box in _BOX.finditer(text)]
    for section in () if found else _SECTION.finditer(text):
        found.append(_group(section[1], [line[2:] for line in section[2].splitlines()]))
    if not any(group.rows for group in found):
        raise ValueError(f"no options in {text!r:.200}")
    return found


def _group(title: str, lines: list[str]) -> Options:
    """An option begins at a line's start; its meaning follows on that line behind two spaces, or indented below."""
    rule = next((i for i, line in enumerate(lines) if line.strip("─ ") == "" and "─" in line), -1)
    rows: list[tuple[str, str]] = []
    for line in lines[rule + 1 :]:
        typed, _, meaning = (part.strip() for part in line.partition("  "))
        if rows and rows[-1][0].count("{") > rows[-1][0].count("}"):  # the choices go on in this line
            rows[-1] = rows[-1][0] + line.strip(), ""
        elif line and not line.startswith(" "):
            rows.append((typed, meaning))
        elif line.strip():
            option, before = rows[-1]
            separator = "\n" if line.strip().startswith("- ") else " "
            rows[-1] = option, (before + separator + line.strip()).strip()
    return Options(title.strip(), " ".join(line.strip() for line in lines[: max(rule, 0)]), rows)


def notes_of(text: str) -> list[str]:
    """What a help text of tyro says between its last frame and its examples, as it stands: how presets differ."""
    after = text.rpartition("╯")[2].partition("\nexamples:")[0].strip()
    return ["", "```text", after, "```"] if "╯" in text and after else []


def tables_of(groups: Iterable[Options]) -> list[str]:
    """Markdown of the groups. ``--help`` itself is left out."""
    lines = ['<div class="options" markdown>']
    for group in groups:
        rows = [(option, meaning) for option, meaning in group.rows if not option.startswith("-h")]
        if not rows:
            continue
        if "arguments" in group.title:
            title = f"**{group.title.capitalize()}.** "
        else:  # "schedule options", or "options" alone
            title = f"### {name.capitalize()}\n\n" if (name := group.title.removesuffix("options").strip()) else ""
        lines += ["", (title + group.note).rstrip(), "", "| option | meaning |", "|---|---|"]
        for option, meaning in rows:
            text = html.escape(meaning, quote=False).replace("|", "\\|").replace("\n- ", "<br>· ")
            text = re.sub(r"\s*\(default: (.*)\)$", _default, text)
            if choices := _CHOICES.fullmatch(option):
                option, some = choices[1], "Some" if choices[3] else "One"
                text += f"<br>{some} of {', '.join(f'`{choice}`' for choice in choices[2].split(','))}."
            names = ", ".join(f"<code>{html.escape(name)}</code>" for name in option.split(", ")).replace("|", "&#124;")
            lines.append(f"| {names} | {text.removeprefix('<br>')} |")
    return [*lines, "", "</div>"]


def _default(mark: re.Match[str]) -> str:
    """A default in parentheses, unless it says only that there is none."""
    return "" if mark[1] in ("None", "False", "") else f"<br>Default: `{mark[1]}`."


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
        # a dot is an accent, not a limit; ~ is a relation
        mathml = re.sub(r"<mover>(?=<mi>[^<]+</mi><mo>&#x002D9;)", '<mover accent="true">', mathml)
        mathml = mathml.replace("&#x0007E;", "&#x0223C;")
        return f'<{formula[1]} class="formula">{mathml}</{formula[1]}>'

    return _FORMULA.sub(drawn, page)


def with_whole_options(page: str) -> str:
    """HTML in which short code, such as --preset, is never broken after a hyphen."""
    return re.sub(r"<code>(?=[^<\n]{1,24}</code>)", '<code class="short">', page)
