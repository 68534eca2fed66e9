"""Matrix instructions, on fragments that the PTX ISA spreads over a warp's threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptx.program import Instruction
from tools.ptx.races import ASYNC, WARP

if TYPE_CHECKING:
    from tools.ptx.machine import Cta


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """Operands in float32 as the tensor core reads them; a word of halves becomes two numbers on a new last axis."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    if kind == "bf16":
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


SHAPES = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "tf32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
}


def _multiply(cta: Cta, instruction: Instruction) -> Callable[[Any], None]:
    """``mma.sync``. Thread (g, t) of 8 × 4 holds rows g and g + 8, words t and t + 4 of k, and columns 2t and 2t + 1 of
    the result.

    Sums are rounded to float32.
    """
    if instruction.opcode not in SHAPES:
        raise instruction.refuse()
    kind = SHAPES[instruction.opcode]
    out, a, b, c = ([cta.register(name, "b32") for name in operand] for operand in instruction.operands)
    results = [register.view(np.float32) for register in out]
    totals = [register.view(np.float32) for register in c]

    def multiply(mask: Any) -> None:
        whole_warps(mask, instruction)
        # (half of k, half of rows, warp, g, t, in a word) -> (warp, rows, k)
        left = widen(np.array(a).reshape(2, 2, -1, 8, 4), kind).transpose(2, 1, 3, 0, 4, 5)
        left = left.reshape(left.shape[0], 16, -1)
        right = widen(np.array(b).reshape(2, -1, 8, 4), kind).transpose(1, 0, 3, 4, 2)
        right = right.reshape(right.shape[0], -1, 8)
        product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for i, (result, total) in enumerate(zip(results, totals)):
            np.add(product[i], total, out=result, where=mask)

    return multiply


def _matrices(cta: Cta, instruction: Instruction) -> Callable[[Any], None]:
    """Load or store 8×8 matrices of 16-bit numbers in shared memory; thread i gives the address of row i."""
    name, *parts = instruction.opcode.split(".")
    transposed = "trans" in parts
    if parts[:3] != ["sync", "aligned", "m8n8"] or parts[4 + transposed :] != ["shared", "b16"]:
        raise instruction.refuse()
    count = int(parts[3][1])
    words, address = instruction.operands if name == "ldmatrix" else instruction.operands[::-1]
    registers = [cta.register(word, "b32") for word in words]
    base = np.broadcast_to(cta.value(address.base, "b32"), cta.thread.shape)

    def rows(mask: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        whole_warps(mask, instruction)
        warps = slice(None) if mask is True else mask.reshape(-1, 32)[:, 0]
        addresses = base.reshape(-1, 32)[warps, : 8 * count].astype(np.int64) + address.offset
        who = np.repeat(WARP + np.arange(cta.num_threads // 32)[warps], 8 * count)
        return warps, cta.shared.rows(addresses.ravel(), 16, instruction), who

    def load(mask: Any) -> None:
        warps, at, who = rows(mask)
        cta.shared.shadow.read(cta.order, at, 16, who, instruction.index)
        matrices = cta.shared.table(16, 2)[at].reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, register in enumerate(registers):
            register.reshape(-1, 32)[warps] = values[:, i]

    def store(mask: Any) -> None:
        warps, at, who = rows(mask)
        values = np.stack([register.reshape(-1, 32)[warps] for register in registers], 1)
        matrices = values.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pieces = np.ascontiguousarray(matrices).reshape(-1, 8)
        table = cta.shared.table(16, 2)
        same = table[at] == pieces
        table[at] = pieces
        cta.shared.shadow.write(cta.order, at, 16, who, instruction.index, same)

    return load if name == "ldmatrix" else store


def whole_warps(mask: Any, instruction: Instruction) -> None:
    if mask is not True:
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise instruction.refuse()


SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row, whose 16-byte pieces are permuted; 16: no permutation


def described(descriptor: int, lines: int, pieces: int, across: bool) -> np.ndarray:
    """Addresses of a tile's 16-byte pieces in shared memory, (lines, pieces).

    A line runs along k (with ``across`` it has a single k, and its pieces run over the operand's other axis). These are
    the canonical layouts of the PTX ISA: rows have the swizzle's size, and eight of them form a block. The stride leads
    to the next eight lines, the leading offset to the piece beyond a row.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    row = SWIZZLES[descriptor >> 62]
    line, piece = np.arange(lines)[:, None], np.arange(pieces)[None, :]
    if row == 16 and across:
        leading, stride = stride, leading
    at = start + line // 8 * stride + line % 8 * row + piece % (row // 16) * 16 + piece // (row // 16) * leading
    if row > 16 and not across:
        at = start + line // 8 * stride + line % 8 * row + piece * 16
    return at ^ (at >> 7 & row // 16 - 1) << 4


def _multiply_together(cta: Cta, instruction: Instruction) -> Callable[[Any], None]:
    """``wgmma``. Each of four warps has 16 of 64 rows, laid out as in ``mma.sync``, eight columns after eight.

    Until the wait, shared memory counts as being read, and the result registers hold NaN for all but the next product
    into them. Shared memory must have been fenced for the asynchronous proxy since it was written. The order of
    registers that ``wgmma.fence`` ensures is not checked.
    """
    shape = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(tf32|bf16|f16)\.\3", instruction.opcode
    )
    if not shape:
        return _product_group(cta, instruction)
    columns, kind = int(shape[1]), shape[3]
    out, a, b, keep, *flags = instruction.operands
    across = [bool(int(flag)) for flag in flags[2:]]
    if flags[:2] != ["1", "1"] or any(across[:-1]):
        raise instruction.refuse()
    key, results = tuple(out), [cta.register(name, "f32") for name in out]
    left = [cta.register(name, "b32") for name in a] if isinstance(a, tuple) else cta.register(a, "b64")
    right, kept = cta.register(b, "b64"), cta.value(keep, "pred")
    item = 4 if kind == "tf32" else 2

    def tile(descriptors: np.ndarray, lines: int, across: bool) -> np.ndarray:
        """(lines, 32 bytes of k) as float32."""
        if (descriptors != descriptors[0]).any() or int(descriptors[0]) >> 49 & 7:
            raise instruction.refuse()
        at = described(int(descriptors[0]), *((16, lines // 8) if across else (lines, 2)), across)
        rows = cta.shared.rows(at.ravel(), 16, instruction)
        cta.shared.shadow.read(cta.order, rows, 16, ASYNC, instruction.index)
        cta.shared.shadow.fenced(cta.order, rows, 16, instruction.index)
        cta.reading.append((rows, instruction.index))
        words = cta.shared.table(16, item)[rows].reshape(len(at), -1)
        values = widen(words, kind)[..., 0] if item == 4 else widen(words.view(np.uint32), kind).reshape(len(at), -1)
        return values.T if across else values

    def multiply(mask: Any) -> None:
        if mask is not True:
            raise instruction.refuse()
        totals = cta.in_flight.pop(key, np.array(results))
        for first in range(0, cta.num_threads, 128):
            group = slice(first, first + 128)
            if isinstance(left, list):
                words = widen(np.array([register[group] for register in left]).reshape(2, 2, -1, 8, 4), kind)
                rows = words.transpose(2, 1, 3, 0, 4, 5).reshape(64, -1)
            else:
                rows = tile(left[group], 64, False)
            product = rows @ tile(right[group], columns, across[-1] if across else False).T
            # (warp, half of rows, g, eight columns, t, one of two) -> (register, thread)
            product = product.reshape(4, 2, 8, -1, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(len(results), 128)
            keeps = np.broadcast_to(kept, cta.thread.shape)[group]
            totals[:, group] = np.where(keeps, totals[:, group], 0) + product
        for result in results:
            result[:] = np.nan
        cta.in_flight[key] = totals
        cta.multiplied.append(key)

    return multiply


def _product_group(cta: Cta, instruction: Instruction) -> Callable[[Any], None]:
    def commit(mask: Any) -> None:
        cta.products.append((cta.reading, cta.multiplied))
        cta.reading, cta.multiplied = [], []

    def wait(mask: Any) -> None:
        while len(cta.products) > int(instruction.operands[0]):
            reading, multiplied = cta.products.pop(0)
            for rows, index in reading:
                cta.shared.shadow.completed(cta.order, rows, 16, None, index)
            later = [cta.multiplied, *(keys for _, keys in cta.products)]
            for key in set(multiplied).difference(*later):
                for name, values in zip(key, cta.in_flight.pop(key)):
                    cta.register(name, "f32")[:] = values

    forms = {"fence": lambda mask: None, "commit_group": commit, "wait_group": wait}
    _, name, *rest = instruction.opcode.split(".")
    if name not in forms or rest != ["sync", "aligned"]:
        raise instruction.refuse()
    return forms[name]


def _fence(cta: Cta, instruction: Instruction) -> Callable[[Any], None]:
    def fence(mask: Any) -> None:
        if mask is not True:
            raise instruction.refuse()
        cta.order.fenced = cta.order.epoch

    return fence


MATRIX: dict[str, Callable[[Any, Instruction], Callable[[Any], None]]] = {
    "mma": _multiply,
    "wgmma": _multiply_together,
    "fence.proxy.async.shared::cta": _fence,
    **dict.fromkeys(("ldmatrix", "stmatrix"), _matrices),
}
