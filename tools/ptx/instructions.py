"""The effect of each instruction on a program's threads: ``bind`` makes it a function of the mask of active threads.

Approximate instructions (``ex2.approx``, ``div.full``, ...) are as exact as numpy; subnormal numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptx.matrices import MATRIX, whole_warps
from tools.ptx.program import WIDTHS, Address, Instruction, integer
from tools.ptx.races import ASYNC, ATOMIC

if TYPE_CHECKING:
    from tools.ptx.machine import Cta, Span

Operation = Callable[[Any], Any]  # takes a mask; a branch returns (kind, who takes it, target)
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def bind(cta: Cta, instruction: Instruction) -> Operation:
    family = instruction.opcode.split(".")[0]
    if family in ("bra", "ret") or instruction.opcode == "bar.sync":
        return _control(cta, instruction)
    for name in (instruction.opcode, instruction.opcode.rpartition(".")[0], family):
        if name in BINDERS:
            operation = BINDERS[name](cta, instruction)
            break
    else:
        raise instruction.refuse()
    if instruction.guard is None:
        return operation
    guard = cta.register(instruction.guard, "pred")
    if instruction.negated:
        return lambda mask: operation(mask & ~guard)
    return lambda mask: operation(guard if mask is True else mask & guard)


def active(cta: Cta, mask: Any) -> np.ndarray:
    return cta.thread if mask is True else np.flatnonzero(mask)


CONTROL = {"bra", "bra.uni", "bar.sync", "ret"}


def _control(cta: Cta, instruction: Instruction) -> Operation:
    if instruction.opcode not in CONTROL:
        raise instruction.refuse()
    if instruction.opcode == "ret":
        if instruction.guard:
            raise instruction.refuse()
        return lambda mask: ("exit", False, 0)
    if instruction.opcode == "bar.sync":
        if instruction.operands != ("0",) or instruction.guard:
            raise instruction.refuse()
        return lambda mask: ("barrier", False, 0)
    target = cta.program.labels[instruction.operands[0]]
    if instruction.guard is None:
        return lambda mask: ("branch", True, target)
    guard = cta.register(instruction.guard, "pred")

    def branch(mask: Any) -> tuple[str, Any, int]:
        taken = ~guard if instruction.negated else guard.copy()
        chosen = taken if mask is True else taken[mask]
        return "branch", True if chosen.all() else False if not chosen.any() else taken, target

    return branch


# Arithmetic: maps an opcode without its type to a function of arrays of that type.


def _divide(a: Any, b: Any) -> Any:
    """Integer division that rounds toward zero."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    return quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)


def _high(a: Any, b: Any) -> Any:
    if a.dtype != np.uint64:
        return ((a.astype(np.int64) if a.dtype == np.int32 else a.astype(np.uint64)) * b >> 32).astype(a.dtype)
    word = np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & word, a >> 32, b & word, b >> 32
    middle = (a0 * b0 >> 32) + (a1 * b0 & word) + (a0 * b1 & word)
    return a1 * b1 + (a1 * b0 >> 32) + (a0 * b1 >> 32) + (middle >> 32)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """Fused multiply-add: rounded once, except in the rare case that float64 rounds the sum to a tie of float32."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _extract(a: Any, first: Any, length: Any) -> Any:
    """A bit field of a 32-bit number; bits beyond the number are its sign, or zero if unsigned."""
    first, length = (np.minimum(np.asarray(n).astype(np.int64) & 0xFF, 32) for n in (first, length))
    field = a.astype(np.int64) >> first & (np.int64(1) << length) - 1
    if a.dtype == np.int32:
        top = np.int64(1) << np.maximum(length, 1) - 1
        field = (field ^ top) - top
    return field.astype(a.dtype)


def _shift(function: Any) -> Callable:
    def shift(a: Any, count: Any) -> Any:
        bits = a.dtype.itemsize * 8
        moved = function(a, np.minimum(count, bits - 1).astype(a.dtype))
        if np.any(count >= bits):
            beyond = function(moved, a.dtype.type(1)) if function is np.right_shift else np.zeros_like(moved)
            moved = np.where(count >= bits, beyond, moved)
        return moved

    return shift


def _wrap_left(low: Any, high: Any, count: Any) -> Any:
    pair = (np.asarray(high, np.uint64) << 32) | low
    return ((pair << (count & 31).astype(np.uint64)) >> 32).astype(np.uint32)


FLOATS, INTEGERS = ("f32", "f64"), ("s16", "u16", "s32", "u32", "s64", "u64")
BITS = ("pred", "b16", "b32", "b64")
ARITHMETIC: dict[str, tuple[Any, tuple[str, ...]]] = {
    **dict.fromkeys(("add", "add.rn"), (np.add, INTEGERS + FLOATS)),
    **dict.fromkeys(("sub", "sub.rn"), (np.subtract, INTEGERS + FLOATS)),
    **dict.fromkeys(("mul", "mul.rn", "mul.rn.ftz"), (np.multiply, FLOATS)),
    "mul.lo": (np.multiply, INTEGERS),
    "mul.hi": (_high, ("u32", "s32", "u64")),
    "mad.lo": (lambda a, b, c: a * b + c, INTEGERS),
    **dict.fromkeys(("fma.rn", "fma.rn.ftz"), (_fused, ("f32",))),
    **dict.fromkeys(("div.full", "div.rn"), (np.divide, FLOATS)),
    "div": (_divide, INTEGERS),
    "rem": (lambda a, b: a - _divide(a, b) * b, INTEGERS),
    "neg": (np.negative, INTEGERS + FLOATS),
    **dict.fromkeys(("abs", "abs.ftz"), (np.abs, ("s32", *FLOATS))),
    "min.relu": (lambda a, b: np.maximum(np.minimum(a, b), 0), ("s32",)),
    "min": (np.fmin, INTEGERS + FLOATS),  # of a number and a NaN, the number
    "max": (np.fmax, INTEGERS + FLOATS),
    "and": (np.bitwise_and, BITS),
    "or": (np.bitwise_or, BITS),
    "xor": (np.bitwise_xor, BITS),
    "not": (np.invert, BITS),
    "bfe": (_extract, ("s32", "u32")),
    "shf.l.wrap": (_wrap_left, ("b32",)),
    "ex2.approx": (np.exp2, ("f32",)),
    "rsqrt.approx.ftz": (lambda a: 1 / np.sqrt(a), ("f32",)),
    **dict.fromkeys(("sqrt.approx.ftz", "sqrt.rn"), (np.sqrt, ("f32",))),
}
SHIFTS = {"shl": np.left_shift, "shr": np.right_shift}
COMPARISONS = {
    **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    "ne": lambda a, b: (a < b) | (a > b),
    "neu": np.not_equal,  # numpy's != is true for NaN
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _arithmetic(cta: Cta, instruction: Instruction) -> Operation:
    name, _, kind = instruction.opcode.rpartition(".")
    function, kinds = ARITHMETIC.get(name, (None, ()))
    if kind not in kinds:
        raise instruction.refuse()
    out, *operands = instruction.operands
    target, sources = cta.register(out, kind), [cta.value(operand, kind) for operand in operands]
    if name == "bfe":
        sources[1:] = [cta.value(operand, "u32") for operand in operands[1:]]
    if isinstance(function, np.ufunc):
        return lambda mask: function(*sources, out=target, where=mask)
    return lambda mask: np.copyto(target, function(*sources), where=mask)


def _shifting(cta: Cta, instruction: Instruction) -> Operation:
    name, _, kind = instruction.opcode.rpartition(".")
    if name not in SHIFTS or kind not in (*INTEGERS, *BITS[1:]):
        raise instruction.refuse()
    out, a, count = instruction.operands
    target, source, by = cta.register(out, kind), cta.value(a, kind), cta.value(count, "u32")
    function = _shift(SHIFTS[name])
    if not by.ndim and by < 8 * target.itemsize:
        plain, by = SHIFTS[name], by.astype(target.dtype)
        return lambda mask: plain(source, by, out=target, where=mask)
    return lambda mask: np.copyto(target, function(source, by), where=mask)


def _wide(cta: Cta, instruction: Instruction) -> Operation:
    kind = instruction.opcode.rpartition(".")[2]
    out, a, b, *c = instruction.operands
    wide = WIDER[kind]
    target, x, y = cta.register(out, wide), cta.value(a, kind), cta.value(b, kind)
    z = cta.value(c[0], wide) if c else 0
    dtype = target.dtype
    return lambda mask: np.copyto(target, x.astype(dtype) * y.astype(dtype) + z, where=mask)


def _carrying(cta: Cta, instruction: Instruction) -> Operation:
    """mad.lo.cc and madc.hi: add a 64-bit product to a number in two halves."""
    high = instruction.opcode == "madc.hi.u32"
    out, *operands = instruction.operands
    target = cta.register(out, "u32")
    a, b, c = (cta.value(operand, "u32") for operand in operands)

    def carrying(mask: Any) -> None:
        product = np.asarray(a, np.uint64) * b
        half = (product >> 32) + c + cta.carry if high else (product & 0xFFFFFFFF) + c
        np.copyto(target, half.astype(np.uint32), where=mask)
        if not high:
            np.copyto(cta.carry, half >> 32, where=mask)

    return carrying


def _compare(cta: Cta, instruction: Instruction) -> Operation:
    _, name, *more, kind = instruction.opcode.split(".")
    if name not in COMPARISONS or more or "|" in instruction.operands[0]:
        raise instruction.refuse()
    out, a, b = instruction.operands
    target, x, y = cta.register(out, "pred"), cta.value(a, kind), cta.value(b, kind)
    function: Any = COMPARISONS[name]
    if isinstance(function, np.ufunc):
        return lambda mask: function(x, y, out=target, where=mask)
    return lambda mask: np.copyto(target, function(x, y), where=mask)


def _select(cta: Cta, instruction: Instruction) -> Operation:
    _, kind = instruction.opcode.split(".")
    out, a, b, p = instruction.operands
    target, x, y, chosen = cta.register(out, kind), cta.value(a, kind), cta.value(b, kind), cta.register(p, "pred")
    return lambda mask: np.copyto(target, np.where(chosen, x, y), where=mask)


def _move(cta: Cta, instruction: Instruction) -> Operation:
    _, kind = instruction.opcode.split(".")
    out, source = instruction.operands
    if isinstance(source, tuple):  # the first part holds the lowest bits
        part = f"b{8 * WIDTHS[kind] // len(source)}"
        target, parts = cta.register(out, kind), [cta.value(name, part) for name in source]

        def pack(mask: Any) -> None:
            pieces = np.stack([np.broadcast_to(part, cta.thread.shape) for part in parts], 1)
            np.copyto(target, pieces.view(target.dtype)[:, 0], where=mask)

        return pack
    if isinstance(out, tuple):
        part = f"b{8 * WIDTHS[kind] // len(out)}"
        whole = cta.value(source, kind)
        targets = [cta.register(name, part) if name != "_" else None for name in out]

        def unpack(mask: Any) -> None:
            pieces = whole.copy().view(f"u{WIDTHS[part]}").reshape(-1, len(targets))
            for i, target in enumerate(targets):
                if target is not None:
                    np.copyto(target, pieces[:, i], where=mask)

        return unpack
    target, value = cta.register(out, kind), cta.value(source, kind)
    return lambda mask: np.copyto(target, value, where=mask)


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; returns its 16 bits."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(a: np.ndarray) -> np.ndarray:
    """Round to the nearest number with 10 fraction bits, ties away from zero; returns its bits as a float32."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    return np.where(np.isnan(a), 0x7FFFFFFF, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).astype(np.uint32)


def to_half(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float16).view(np.uint16)


CONVERSIONS: dict[str, tuple[str, str, Callable]] = {
    "cvt.f32.bf16": ("f32", "b16", lambda a: (a.astype(np.uint32) << 16).view(np.float32)),
    "cvt.rn.bf16.f32": ("b16", "f32", to_bfloat16),
    "cvt.f32.f16": ("f32", "b16", lambda a: a.view(np.float16).astype(np.float32)),
    "cvt.rn.f16.f32": ("b16", "f32", to_half),
    "cvt.rna.tf32.f32": ("b32", "f32", to_tf32),
    "cvt.rni.ftz.s32.f32": ("s32", "f32", lambda a: np.rint(a).astype(np.int32)),
}
PAIRS = {"cvt.rn.bf16x2.f32": to_bfloat16, "cvt.rn.f16x2.f32": to_half}
PLAIN = {"s16", "u16", "s32", "u32", "s64", "u64"}


def _convert(cta: Cta, instruction: Instruction) -> Operation:
    opcode = instruction.opcode
    if opcode in PAIRS:  # the first operand is the upper half
        out, high, low = instruction.operands
        target, x, y, half = cta.register(out, "b32"), cta.value(high, "f32"), cta.value(low, "f32"), PAIRS[opcode]
        return lambda mask: np.copyto(target, half(x).astype(np.uint32) << 16 | half(y), where=mask)
    out, operand = instruction.operands
    if opcode in CONVERSIONS:
        to, of, function = CONVERSIONS[opcode]
        target, source = cta.register(out, to), cta.value(operand, of)
        return lambda mask: np.copyto(target, function(source), where=mask)
    *rounding, to, of = opcode.split(".")[1:]
    if not ({to, of} <= PLAIN and not rounding) and not (rounding == ["rn"] and to in FLOATS and of in (*PLAIN, "f64")):
        raise instruction.refuse()
    target, source = cta.register(out, to), cta.value(operand, of)
    return lambda mask: np.copyto(target, source.astype(target.dtype), where=mask)


def _parameter(cta: Cta, instruction: Instruction) -> Operation:
    kind = instruction.opcode.split(".")[2]
    name, address = instruction.operands
    given = cta.arguments[address.base]
    if address.offset:
        raise instruction.refuse()
    value = given if isinstance(given, (int, float)) else given.data_ptr()
    bits = np.array([value], np.float32 if isinstance(value, float) else np.int64)
    if kind != "b64" and isinstance(value, int):
        bits = bits.astype(np.int32)
    prefix = name.rstrip("0123456789")
    width = WIDTHS[cta.program.registers[prefix][0]]
    if isinstance(value, int) and width == 8 and kind == "u32":
        bits = bits.view(np.uint32)
    target = cta.register(name, "s64" if width == 8 else "b32")
    value = bits.astype(np.int64) if width == 8 else bits.view(np.uint32)
    return lambda mask: np.copyto(target, value, where=mask)


def _span(cta: Cta, space: str, addresses: np.ndarray, instruction: Instruction) -> Span:
    return cta.shared if space == "shared" else cta.memory.find(addresses, instruction)


def _form(instruction: Instruction, modifiers: set[str]) -> tuple[str, set[str], int, int]:
    """Memory space, all modifiers, number of items, and bytes per item."""
    _, *parts = instruction.opcode.split(".")
    kind = parts.pop()
    count = {"v2": 2, "v4": 4}.get(parts[-1], 1)
    names = set(parts) - {f"v{count}"}
    spaces = names & {"global", "shared", "local"}
    if len(spaces) != 1 or not names - spaces <= modifiers or WIDTHS.get(kind, 1) < 2:
        raise instruction.refuse()
    return spaces.pop(), names, count, WIDTHS[kind]


def _base(cta: Cta, address: Address, space: str) -> np.ndarray:
    """Each thread's address without the offset, as a view: it follows the register's later values."""
    kind = "b64" if space == "global" else "b32"
    if address.base.startswith("%"):
        kind = cta.program.registers[address.base.rstrip("0123456789")][0]
    return np.broadcast_to(cta.value(address.base, kind), cta.thread.shape)


def _load(cta: Cta, instruction: Instruction) -> Operation:
    """Of the modifiers only ``acquire`` has an effect, on order; ``.cg`` and ``.nc`` choose a cache."""
    space, names, count, item = _form(instruction, {"cg", "nc", "gpu", "sys", "acquire", "relaxed"})
    outs, address = instruction.operands
    outs = outs if isinstance(outs, tuple) else (outs,)
    targets = [cta.register(name, f"b{8 * item}") for name in outs]
    base, offset = _base(cta, address, space), address.offset
    atomic = bool(names & {"acquire", "relaxed"})

    if space == "local":
        if count != 1 or item != 4:
            raise instruction.refuse()

        def local(mask: Any) -> None:
            who = active(cta, mask)
            targets[0][who] = cta.local[(base[who].astype(np.int64) + offset) // 4, who]

        return local

    def load(mask: Any) -> None:
        who = active(cta, mask)
        if not len(who):
            return
        addresses = base[who].astype(np.int64) + offset
        span = _span(cta, space, addresses, instruction)
        values = span.load(cta.order, addresses, count * item, item, ATOMIC if atomic else who, instruction)
        for i, target in enumerate(targets):
            target[who] = values[:, i]
        if atomic:
            cta.polled = True
            cta.memory.polls += 1
            if "acquire" in names and names & {"gpu", "sys"}:
                for at in np.unique(addresses):
                    if (seen := cta.memory.released.get(int(at))) is not None:
                        np.maximum(cta.order.acquired, seen, out=cta.order.acquired)

    return load


def _store(cta: Cta, instruction: Instruction) -> Operation:
    space, _, count, item = _form(instruction, set())
    address, names = instruction.operands
    names = names if isinstance(names, tuple) else (names,)
    sources = [np.broadcast_to(cta.value(name, f"b{8 * item}"), cta.thread.shape) for name in names]
    base, offset = _base(cta, address, space), address.offset
    if space == "local":
        if count != 1 or item != 4:
            raise instruction.refuse()

        def local(mask: Any) -> None:
            who = active(cta, mask)
            cta.local[(base[who].astype(np.int64) + offset) // 4, who] = sources[0][who]

        return local

    def store(mask: Any) -> None:
        who = active(cta, mask)
        if len(who):
            addresses = base[who].astype(np.int64) + offset
            values = np.stack([source[who] for source in sources], 1)
            _span(cta, space, addresses, instruction).store(cta.order, addresses, values, who, instruction)

    return store


def _add_atomically(cta: Cta, instruction: Instruction) -> Operation:
    """With ``release``, publishes what all threads did before the last barrier and what they have seen of others."""
    parts = instruction.opcode.split(".")
    if (
        parts[1] != "global"
        or parts[2] != "gpu"
        or parts[3] not in ("release", "relaxed")
        or parts[4:] != ["add", "u32"]
    ):
        raise instruction.refuse()
    out, address, operand = instruction.operands
    target, base, amount = cta.register(out, "u32"), cta.value(address.base, "s64"), cta.value(operand, "u32")

    def add(mask: Any) -> None:
        for thread in active(cta, mask):
            at = base[thread : thread + 1] + address.offset
            span = cta.memory.find(at, instruction)
            rows = span.rows(at, 4, instruction)
            cell = span.table(4, 4)[int(rows[0])]
            target[thread] = cell[0]
            cell[0] += amount if not amount.ndim else amount[thread]
            span.shadow.write(cta.order, rows, 4, ATOMIC, instruction.index)
            cta.memory.polls = 0
            if parts[3] == "release":
                seen = cta.memory.released.setdefault(int(at[0]), np.zeros_like(cta.order.seen))
                np.maximum(seen, cta.order.seen, out=seen)

    return add


def _copy(cta: Cta, instruction: Instruction) -> Operation:
    """An asynchronous copy. Its target holds poison until the wait."""
    if instruction.opcode not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
        return _copy_group(cta, instruction)
    target, source, size, *filled = instruction.operands
    width = integer(size)
    to, base = _base(cta, target, "shared"), _base(cta, source, "global")
    given = np.broadcast_to(cta.value(filled[0], "u32") if filled else np.uint32(width), cta.thread.shape)

    def copy(mask: Any) -> None:
        who = active(cta, mask)
        if not len(who):
            return
        if ((given[who] != 0) & (given[who] != width)).any():
            raise instruction.refuse()
        values = np.zeros((len(who), width // 4), np.uint32)
        reads = given[who] != 0
        origin = None
        if reads.any():
            addresses = base[who[reads]].astype(np.int64) + source.offset
            span = cta.memory.find(addresses, instruction)
            values[reads] = span.load(cta.order, addresses, width, 4, ASYNC, instruction)
            origin = span, span.rows(addresses, width, instruction)
        rows = cta.shared.rows(to[who].astype(np.int64) + target.offset, width, instruction)
        cta.shared.shadow.write(cta.order, rows, width, ASYNC, instruction.index)
        cta.shared.table(width, 4)[rows] = 0xFFFFFFFF
        cta.uncommitted.append((rows, width, values, who, origin, instruction.index))

    return copy


def _copy_group(cta: Cta, instruction: Instruction) -> Operation:
    def all_threads(mask: Any) -> None:
        if mask is not True and not mask.all():
            raise instruction.refuse()

    def commit(mask: Any) -> None:
        all_threads(mask)
        cta.copies.append(cta.uncommitted)
        cta.uncommitted = []

    def wait(mask: Any) -> None:
        all_threads(mask)
        while len(cta.copies) > pending:
            for rows, width, values, who, origin, index in cta.copies.pop(0):
                cta.shared.table(width, 4)[rows] = values
                cta.shared.shadow.completed(cta.order, rows, width, who, index)
                if origin:
                    origin[0].shadow.completed(cta.order, origin[1], width, None, index)

    if instruction.opcode == "cp.async.commit_group":
        return commit
    if instruction.opcode != "cp.async.wait_group":
        raise instruction.refuse()
    pending = integer(instruction.operands[0])
    return wait


def _warp_barrier(cta: Cta, instruction: Instruction) -> Operation:
    if instruction.operands != ("-1",):
        raise instruction.refuse()

    def wait(mask: Any) -> None:
        if mask is not True:
            raise instruction.refuse()
        cta.order.warp_barrier()

    return wait


def _shuffle(cta: Cta, instruction: Instruction) -> Operation:
    """Exchange numbers among the 32 threads of a warp."""
    out, a, b, clamp, members = instruction.operands
    if instruction.opcode not in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32") or (clamp, members) != ("31", "-1"):
        raise instruction.refuse()
    target, source, lane = cta.register(out, "b32"), cta.value(a, "b32"), cta.value(b, "s32")
    lanes = cta.thread % 32

    def shuffle(mask: Any) -> None:
        whole_warps(mask, instruction)
        other = lanes ^ lane if "bfly" in instruction.opcode else np.broadcast_to(lane & 31, lanes.shape)
        np.copyto(target, np.broadcast_to(source, lanes.shape)[cta.thread - lanes + other], where=mask)

    return shuffle


BINDERS: dict[str, Callable[[Any, Instruction], Operation]] = {
    **dict.fromkeys(ARITHMETIC, _arithmetic),
    **dict.fromkeys(SHIFTS, _shifting),
    **dict.fromkeys(("mul.wide", "mad.wide"), _wide),
    **dict.fromkeys(("mad.lo.cc.u32", "madc.hi.u32"), _carrying),
    **{"setp": _compare, "selp": _select, "mov": _move, "cvt": _convert, "ld": _load, "st": _store},
    **{f"ld.param.{kind}": _parameter for kind in ("b32", "u32", "s32", "f32", "b64", "u64")},
    **{"atom": _add_atomically, "cp": _copy, "shfl": _shuffle, "bar.warp.sync": _warp_barrier},
    **MATRIX,
}
