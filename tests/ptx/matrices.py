"""Matrix instructions: fragments spread over a warp's threads, as the PTX ISA lays them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.program import Instruction
from tests.ptx.races import MANY

if TYPE_CHECKING:
    from tests.ptx.machine import Cta


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """Operands as the tensor core reads them, the last axis two numbers a word where they are halves."""
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
    """A thread (g, t) of 8 × 4 holds rows g and g + 8; in k, word t and word t + 4; of the result columns 2t, 2t + 1.

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
    """8×8 matrices of 16 bits from or to shared memory, thread i giving the address of row i."""
    name, *parts = instruction.opcode.split(".")
    transposed = "trans" in parts
    if parts[:3] != ["sync", "aligned", "m8n8"] or parts[4 + transposed :] != ["shared", "b16"]:
        raise instruction.refuse()
    count = int(parts[3][1])
    words, address = instruction.operands if name == "ldmatrix" else instruction.operands[::-1]
    registers = [cta.register(word, "b32") for word in words]
    base = np.broadcast_to(cta.value(address.base, "b32"), cta.thread.shape)

    def rows(mask: Any) -> tuple[Any, np.ndarray]:
        whole_warps(mask, instruction)
        warps = slice(None) if mask is True else mask.reshape(-1, 32)[:, 0]
        addresses = base.reshape(-1, 32)[warps, : 8 * count].astype(np.int64) + address.offset
        return warps, cta.shared.rows(addresses.ravel(), 16, instruction)

    def load(mask: Any) -> None:
        warps, at = rows(mask)
        cta.shared.shadow.read(cta.order, at, 16, np.full(len(at), MANY), instruction.index)
        matrices = cta.shared.table(16, 2)[at].reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, register in enumerate(registers):
            register.reshape(-1, 32)[warps] = values[:, i]

    def store(mask: Any) -> None:
        warps, at = rows(mask)
        values = np.stack([register.reshape(-1, 32)[warps] for register in registers], 1)
        matrices = values.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pieces = np.ascontiguousarray(matrices).reshape(-1, 8)
        table = cta.shared.table(16, 2)
        same = table[at] == pieces
        table[at] = pieces
        cta.shared.shadow.write(cta.order, at, 16, np.full(len(at), MANY), instruction.index, same)

    return load if name == "ldmatrix" else store


def whole_warps(mask: Any, instruction: Instruction) -> None:
    if mask is not True:
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise instruction.refuse()


MATRIX: dict[str, Callable[[Any, Instruction], Callable[[Any], None]]] = {
    "mma": _multiply,
    **dict.fromkeys(("ldmatrix", "stmatrix"), _matrices),
}
