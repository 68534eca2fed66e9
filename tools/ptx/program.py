"""Parse PTX text into blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WIDTHS = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8, "pred": 1}


class NotEmulatedError(NotImplementedError):
    """The emulator does not know an instruction, or a form of it. It never skips one."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    index: int
    line: int
    text: str
    opcode: str
    operands: tuple[Any, ...]  # each a str, an Address, or a tuple of str for {...}
    guard: str | None = None
    negated: bool = False

    def refuse(self) -> NotEmulatedError:
        return NotEmulatedError(f"not emulated: {self.opcode.split('.')[0]}, line {self.line}: {self.text}")


@dataclass
class Program:
    """One entry point. A block ends where threads may part or wait: at a branch, a barrier or the end."""

    parameters: list[tuple[str, str]] = field(default_factory=list)  # name, type
    threads: int = 0
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # prefix -> type, count
    local_bytes: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the block that a label begins


def parse(text: str) -> Program:
    program = Program()
    block: list[Instruction] = []
    count = 0
    body = False

    def end_block() -> None:
        nonlocal block
        if block:
            program.blocks.append(block)
            block = []

    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"//.*", "", line).strip()
        if not line or (line == "{" and body):
            continue
        if not body:
            body = _declaration(program, line)
            continue
        if line == "}":  # ends the entry, or a scope in inline assembly, which has no registers of its own
            if text.splitlines()[number - 1].startswith("}"):
                break
        elif match := re.fullmatch(r"([\w$]+):", line):
            end_block()
            program.labels[match[1]] = len(program.blocks)
        elif line.startswith("."):
            _directive(program, line)
        else:
            if not line.endswith(";"):
                raise NotEmulatedError(f"not one instruction, line {number}: {line}")
            block.append(_instruction(count, number, line))
            count += 1
            if block[-1].opcode.split(".")[0] in ("bra", "ret") or block[-1].opcode == "bar.sync":
                end_block()
    end_block()
    return program


def _declaration(program: Program, line: str) -> bool:
    """Read a line before the code; returns whether the code begins here."""
    if match := re.match(r"\.param \.(\w+).*?(\w+),?$", line):
        program.parameters.append((match[2], match[1]))
    elif match := re.match(r"\.reqntid (\d+)", line):
        program.threads = int(match[1])
    elif match := re.match(r"\.global \.align \d+ \.b8 ([\w$]+)\[(\d+)\] = \{(.*)\}", line):
        values = [int(value) for value in match[3].split(",")]
        program.constants[match[1]] = np.array(values + [0] * (int(match[2]) - len(values)), np.uint8)
    return line == "{"


def _directive(program: Program, line: str) -> None:
    if match := re.match(r"\.reg \.(\w+)\s+(%[a-zA-Z]+)<(\d+)>;", line.replace("\t", " ")):
        program.registers[match[2]] = (match[1], int(match[3]))
    elif match := re.match(r"\.reg \.(\w+)\s+(%[a-zA-Z]+);", line.replace("\t", " ")):
        program.registers[match[2]] = (match[1], 0)
    elif match := re.match(r"\.local \.align \d+ \.b8\s+\w+\[(\d+)\];", line.replace("\t", " ")):
        program.local_bytes = int(match[1])
    elif not re.match(r"\.(loc|pragma|file)\b", line):
        raise NotEmulatedError(f"not emulated: {line}")


def _instruction(index: int, number: int, line: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*);", line)
    if not match:
        raise NotEmulatedError(f"cannot read line {number}: {line}")
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[4])
    operands = tuple(_operand(part.strip()) for part in parts)
    return Instruction(index, number, line, match[3], operands, match[2], match[1] == "!")


def _operand(text: str) -> Any:
    if text[0] == "{":
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text


def integer(text: str) -> int:
    return int(text, 16) if "0x" in text.lower() else int(text)
