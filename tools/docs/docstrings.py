"""From our docstrings, which a terminal shows as they are, to those that the site's generator reads.

``:func:`name``` becomes a link. Arguments and errors that share a line, "damping, eps: ...", get one each, arguments
with their own type. What is returned begins with its type. A single "Example:" is one of the examples.
"""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth):`~?([\w.]+)`")
_SHARED = re.compile(r"^ {4}(\w+(?:,\s+\w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_LISTS = re.compile(r"^(?:Args|Attributes|Raises):\n(?: {4}.*\n?|\n)+", re.MULTILINE)


def readable(text: str, package: str, returns: str | None = None) -> str:
    """The docstring as the generator reads it.

    Args:
        text: the docstring, without indentation.
        package: its package; roles without dots name something public of it.
        returns: the annotation of what a function returns.
    """

    def link(role: re.Match[str]) -> str:
        name = role[1] if "." in role[1] else f"{package}.{role[1]}"
        return f"[`{role[1].removeprefix(f'{package}.')}`][{name}]"

    def each(shared: re.Match[str]) -> str:
        return "\n".join(f"    {name}: {shared[2]}" for name in re.split(r",\s+", shared[1]))

    text = _ROLE.sub(link, text)
    text = _LISTS.sub(lambda section: _SHARED.sub(each, section[0]), text)
    if returns is not None:
        text = re.sub(r"^Returns:\n {4}", lambda start: f"{start[0]}{returns}: ", text, flags=re.MULTILINE)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Readable(griffe.Extension):
    """Rewrites each docstring when the generator meets it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            package = obj.path.partition(".")[0]
            returns = str(obj.returns) if isinstance(obj, griffe.Function) and obj.returns else None
            obj.docstring.value = readable(obj.docstring.value, package, returns)
