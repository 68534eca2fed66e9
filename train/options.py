"""Command lines made from documented dataclasses: what tyro does, with options in groups and examples at the end."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from train.exits import Exit

Config = TypeVar("Config")
WITHIN_TEXT = re.compile(r"\s*\n(?!- )\s*")
"""A line break that is not before an item of a list."""


class Group:
    """Base of the dataclasses whose fields ``--help`` shows in a box of their own; a configuration inherits from some.

    The fields are the configuration's own, and flags without a prefix: groups change nothing but the help.
    """

    title: ClassVar[str]
    """Of the box; "options" follows."""


def parse(
    kind: type[Config],
    argv: Sequence[str] | None,
    *,
    program: str,
    default: Config | None = None,
    ending: Callable[[], str],
) -> Config:
    """Read the command line.

    Args:
        kind: a dataclass whose fields are the options; the docstring of each is its help.
        argv: the options; None: those of this process. ``["--help"]`` prints the help to stdout.
        program: the command as people type it, such as ``python train/play.py``.
        default: the values of options that are not given; None: the defaults of ``kind``.
        ending: what to print below the help, such as examples.

    Raises:
        SystemExit: 0 after the help; 2 if an option is unknown or has a bad value, after a message on stderr.
    """
    to_terminals = sys.stdout.isatty() and sys.stderr.isatty()  # tyro looks at stdout even for what goes to stderr
    tyro._experimental_options["ansi_codes"] = to_terminals and not os.environ.get("NO_COLOR")
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with _REGISTRY:
            return tyro.cli(
                kind,
                args=argv,
                prog=program,
                description=_wrapped(_joined(kind.__doc__ or ""), "  "),  # tyro joins lines that are not indented
                config=(tyro.conf.OmitArgPrefixes,),
                **given,
            )
    except SystemExit as end:
        if end.code == Exit.REFUSED and "--json" in (sys.argv if argv is None else argv):
            print(json.dumps({"error": "an option is unknown or has a bad value, see stderr", "exit_code": end.code}))
        if end.code == Exit.DONE:
            codes = ", ".join(f"{code.value} {code.name.lower()}" for code in Exit)
            print("", ending(), "", _wrapped(f"exit codes: {codes}; see docs/commands/exit-codes.md"), sep="\n")
        raise


def examples(*commands: tuple[str, str]) -> str:
    """Commands with what each does, as the end of a help text."""
    return "\n".join(["examples:", *(f"\n  {command}\n      {what}" for command, what in commands)])


def _wrapped(text: str, indent: str = "") -> str:
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


_REGISTRY = ConstructorRegistry()


@_REGISTRY.struct_rule
def _documented(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Dataclasses as tyro reads them, but with `Group`s, and without the line breaks of their source in the help."""
    kind = info.type
    if not dataclasses.is_dataclass(kind):
        return None
    groups: list[Any] = [base for base in kind.__bases__ if issubclass(base, Group) and base is not Group]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {name: _default(field, info.default) for name, field in fields.items()}
    types, texts = typing.get_type_hints(kind, include_extras=True), _texts(kind)
    specs = []
    for group in groups:
        names = [field.name for field in dataclasses.fields(group) if fields.pop(field.name, None)]
        default = group(**{name: values[name] for name in names})
        annotated: Any = Annotated[group, tyro.conf.arg(name=group.title)]
        specs.append(StructFieldSpec(group.__name__, annotated, default, _joined(group.__doc__ or "")))
    own = [StructFieldSpec(name, types[name], values[name], texts.get(name)) for name in fields]

    def instantiate(**given: Any) -> Any:
        for group in groups:
            given |= vars(given.pop(group.__name__))
        return kind(**given)

    return StructConstructorSpec(instantiate, (*own, *specs))


def _default(field: dataclasses.Field[Any], instance: Any) -> Any:
    if dataclasses.is_dataclass(instance):
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else tyro.MISSING


def _texts(kind: type) -> dict[str, str]:
    """The docstring of each field."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        for text in docstring_parser.parse_from_object(base).params:
            found[text.arg_name] = _joined(text.description or "")
    return found


def _joined(docstring: str) -> str:
    text = WITHIN_TEXT.sub(" ", inspect.cleandoc(docstring))
    return f"{text}\n" if "\n" in text else text  # tyro's "(default: ...)" is no part of the last item
