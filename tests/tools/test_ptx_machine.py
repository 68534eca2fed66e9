"""The PTX emulator itself: single instructions against the PTX ISA, and races that it must see."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.ptx.machine import MemoryFault, launch
from tools.ptx.program import NotEmulatedError, parse
from tools.ptx.races import Race

HEAD = """.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 first,
\t.param .u64 .ptr .global .align 1 second
)
.reqntid {threads}
{{
\t.reg .pred %p<8>;
\t.reg .b16 %rs<8>;
\t.reg .b32 %r<32>;
\t.reg .b64 %rd<16>;
\tld.param.b64 %rd1, [first];
\tld.param.b64 %rd2, [second];
\tmov.u32 %r1, %tid.x;
\tmul.wide.u32 %rd3, %r1, 4;
\tadd.s64 %rd4, %rd1, %rd3;
\tadd.s64 %rd5, %rd2, %rd3;
\tshl.b32 %r2, %r1, 2;
"""


def run(body: str, first: Tensor, second: Tensor, threads: int = 32, programs: int = 1, shared: int = 0) -> set[Race]:
    """Run PTX. %r1 is the thread, %r2 four times that; %rd4 and %rd5 point to the thread's word in each tensor."""
    lines = "".join(
        f"\t{line.strip()};\n" if line.strip()[-1] != ":" else line.strip() + "\n" for line in body.split(";")
    )
    return set(
        launch(parse(HEAD.format(threads=threads) + lines + "\tret;\n}\n"), (programs,), [first, second], shared)
    )


def bits(number: float) -> int:
    return struct.unpack("<i", struct.pack("<f", number))[0]


def number(word: int) -> float:
    return struct.unpack("<f", struct.pack("<i", word))[0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("instruction", "a", "b", "c", "result"),
    [
        ("div.s32 %r6, %r3, %r4", -7, 2, 0, -3),
        ("shr.s32 %r6, %r3, %r4", -8, 40, 0, -1),
        ("shr.u32 %r6, %r3, %r4", -8, 40, 0, 0),
        ("shl.b32 %r6, %r3, 4", 0x1F000001, 0, 0, -0x0FFFFFF0),
        ("bfe.s32 %r6, %r3, 1, 1", 2, 0, 0, -1),
        ("bfe.u32 %r6, %r3, 4, 4", 0xABC, 0, 0, 0xB),
        ("bfe.s32 %r6, %r3, 28, 8", -(2**31), 0, 0, -8),
        ("bfe.u32 %r6, %r3, 28, 8", 0xF0000000, 0, 0, 0xF),
        ("bfe.u32 %r6, %r3, 4, 0", 0xABC, 0, 0, 0),
        ("mul.hi.u32 %r6, %r3, %r4", -1, -1, 0, -2),
        ("min.relu.s32 %r6, %r3, %r4", -5, 3, 0, 0),
        ("mad.lo.cc.u32 %r7, %r3, %r4, %r5; madc.hi.u32 %r6, %r3, %r4, 0", -1, 1, 1, 1),
        ("shf.l.wrap.b32 %r6, %r3, %r4, %r5", -0x80000000, 1, 1, 3),
        ("mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r6, {%rs2, %rs1}", 0x00020001, 0, 0, 0x00010002),
        ("max.f32 %r6, %r3, %r4", NAN, 2.0, 0, 2.0),
        ("setp.leu.f32 %p1, %r3, %r4; selp.b32 %r6, 1, 0, %p1", NAN, 2.0, 0, 1),
        ("setp.gt.f32 %p1, %r3, %r4; selp.b32 %r6, 1, 0, %p1", NAN, 2.0, 0, 0),
        ("setp.num.f32 %p1, %r3, %r4; selp.b32 %r6, 1, 0, %p1", NAN, 2.0, 0, 0),
        ("fma.rn.f32 %r6, %r3, %r4, %r5", 1 + 2**-23, 1 + 2**-23, -(1 + 2**-22), 2.0**-46),
        ("cvt.rna.tf32.f32 %r6, %r3", 1 + 2**-11, 0, 0, 1 + 2**-10),
        ("cvt.rn.bf16x2.f32 %r6, %r3, %r4", 1.0, -2.0, 0, 0x3F80C000),
        ("cvt.rn.bf16.f32 %rs1, %r3; cvt.f32.bf16 %r6, %rs1", 1 + 3 * 2**-8, 0, 0, 1 + 2**-6),
        ("cvt.rn.bf16.f32 %rs1, %r3; cvt.f32.bf16 %r6, %rs1", 1 + 2**-8, 0, 0, 1.0),
        ("cvt.rni.ftz.s32.f32 %r6, %r3", 2.5, 0, 0, 2),
        ("cvt.s64.s32 %rd6, %r3; mul.hi.u64 %rd6, %rd6, %rd6; cvt.u32.u64 %r6, %rd6", -1, 0, 0, -2),
        (
            "mad.wide.s32 %rd6, %r3, %r4, -1; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r6, %rd6",
            1 << 20,
            -(1 << 20),
            0,
            -257,
        ),
        ("ex2.approx.f32 %r6, %r3", 3.0, 0, 0, 8.0),
        ("shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1", 0, 0, 0, 1),
        ("shfl.sync.idx.b32 %r6, %r1, %r3, 31, -1", 7, 0, 0, 7),
    ],
)
def test_instructions(instruction: str, a: float, b: float, c: float, result: float) -> None:
    words = [bits(x) if isinstance(x, float) else (x + 2**31) % 2**32 - 2**31 for x in (a, b, c)]
    out = torch.zeros(64, dtype=torch.int32)
    body = "".join(f"ld.global.b32 %r{3 + i}, [%rd1+{4 * i}]; " for i in range(3))
    assert not run(body + instruction + "; st.global.b32 [%rd5], %r6", torch.tensor(words, dtype=torch.int32), out)
    assert (number(int(out[0])) if isinstance(result, float) else int(out[0])) == result


def test_bfloat16_rounds_as_torch_does() -> None:
    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 3.4e38, float("inf"), float("nan"), 1e-40])])
    from tools.ptx.instructions import to_bfloat16

    ours = torch.from_numpy(to_bfloat16(numbers.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool) -> None:
    """Thread (g, t) gets word t of row g, or of column g if transposed."""
    matrix, out = torch.arange(64, dtype=torch.int16), torch.zeros(32, dtype=torch.int32)
    load = f"ldmatrix.sync.aligned.m8n8.x1{'.trans' if transposed else ''}.shared.b16 {{%r4}}, [%r5]"
    body = f"""ld.global.b32 %r3, [%rd4]; st.shared.b32 [%r2], %r3; bar.sync 0;
        and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 4; {load}; st.global.b32 [%rd5], %r4"""
    assert not run(body, matrix, out, shared=128)
    square = matrix.view(8, 8)
    assert torch.equal(out.view(torch.int16).view(8, 8), square.T if transposed else square)


def test_a_tensor_core_ignores_thirteen_bits() -> None:
    """1 + 2^-11 reads as 1, so the sum of eight products of it with 1 is 8."""
    words, out = torch.full((32,), 1 + 2**-11), torch.zeros(32)
    body = """ld.global.b32 %r3, [%rd4]; mov.b32 %r4, 0f3F800000; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;
        mov.b32 %r8, 0; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
        {%r5, %r6, %r7, %r8}, {%r3, %r3, %r3, %r3}, {%r4, %r4}, {%r5, %r6, %r7, %r8}; st.global.b32 [%rd5], %r5"""
    assert not run(" ".join(body.split()), words, out)
    assert torch.equal(out, torch.full((32,), 8.0))


def test_threads_part_and_meet_again() -> None:
    """Odd threads take another path; even ones go round a loop as many times as their number."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """and.b32 %r3, %r1, 1; setp.eq.b32 %p1, %r3, 1; mov.b32 %r4, 0; @%p1 bra $ODD; $LOOP:; add.s32 %r4, %r4, 1;
        setp.lt.s32 %p2, %r4, %r1; @%p2 bra $LOOP; bra.uni $END; $ODD:; mov.b32 %r4, -1; $END:; bar.sync 0;
        st.global.b32 [%rd5], %r4"""
    assert not run(body, out, out)
    assert out.tolist() == [-1 if i % 2 else max(1, i) for i in range(32)]


EXCHANGE = "st.shared.b32 [%r2], %r1; {} xor.b32 %r3, %r2, {}; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd5], %r4"
COUNTER = """st.global.b32 [%rd4], %r1; {wait_own} setp.eq.b32 %p1, %r1, 0; @%p1 atom.global.gpu.{release}.add.u32 %r4,
    [%rd2+0], 1; $SPIN:; ld.global.gpu.{acquire}.b32 %r5, [%rd2+0]; setp.lt.u32 %p2, %r5, 2; @%p2 bra $SPIN; bar.sync 0;
    {write}"""


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (EXCHANGE.format("bar.sync 0;", 4), set()),
        (EXCHANGE.format("", 0), set()),  # each thread's own word
        (EXCHANGE.format("", 4), {"read after write"}),  # of the same warp
        (EXCHANGE.format("", 128), {"read after write"}),
        (EXCHANGE.format("bar.warp.sync -1;", 4), set()),
        (EXCHANGE.format("bar.warp.sync -1;", 128), {"read after write"}),
        (
            "ld.shared.b32 %r3, [global_smem+0]; bar.warp.sync -1; st.shared.b32 [global_smem+0], 1",
            {"write after read"},
        ),
        ("ld.shared.b32 %r3, [%r2]; xor.b32 %r4, %r2, 4; st.shared.b32 [%r4], %r3", {"write after read"}),
        ("st.shared.b32 [global_smem+0], 1", set()),  # all store the same
        ("st.shared.b32 [global_smem+0], %r1", {"two values"}),
        ("st.global.b32 [%rd2], 1; st.global.b32 [%rd2], %r1", {"two values", "write after write"}),
    ],
)
def test_races_within_a_program(body: str, kinds: set[str]) -> None:
    words = torch.zeros(64, dtype=torch.int32)
    assert {race.kind for race in run(body, words, words.clone(), threads=64, shared=256)} == kinds


@pytest.mark.parametrize(
    ("own", "release", "acquire", "kinds"),
    [
        ("bar.sync 0;", "release", "acquire", set()),
        ("", "release", "acquire", {"write after write"}),
        ("bar.sync 0;", "relaxed", "acquire", {"write after write"}),
        ("bar.sync 0;", "release", "relaxed", {"write after write"}),
    ],
)
def test_races_between_programs(own: str, release: str, acquire: str, kinds: set[str]) -> None:
    """Each program writes its own half, waits for the other program, and writes to the other half."""
    mine = "mov.u32 %r6, %ctaid.x; shl.b32 %r7, %r6, 8; cvt.u64.u32 %rd6, %r7; add.s64 %rd4, %rd4, %rd6;"
    other = "sub.s32 %r8, 256, %r7; cvt.u64.u32 %rd7, %r8; add.s64 %rd8, %rd1, %rd3; add.s64 %rd8, %rd8, %rd7;"
    write = other + "add.s32 %r9, %r1, 5; st.global.b32 [%rd8], %r9"
    body = mine + COUNTER.format(wait_own=own, release=release, acquire=acquire, write=write)
    halves, counter = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    races = run(" ".join(body.split()), halves, counter, threads=64, programs=2)
    assert {race.kind for race in races} == kinds


@pytest.mark.parametrize(
    ("wait", "barrier", "kinds"),
    [
        ("cp.async.wait_group 0;", "bar.sync 0;", set()),
        ("cp.async.wait_group 1;", "bar.sync 0;", {"read after write"}),
        ("cp.async.wait_group 0;", "", {"read after write"}),
    ],
)
def test_copies_are_waited_for(wait: str, barrier: str, kinds: set[str]) -> None:
    """Without the wait the result is NaN; without the barrier there is a race with another thread's copy."""
    words, out = torch.randn(32), torch.zeros(32)
    body = f"""cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x4, 4; cp.async.commit_group; {wait} {barrier}
        xor.b32 %r3, %r2, 4; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd5], %r4"""
    races = run(body, words, out, shared=128)
    assert {race.kind for race in races} == kinds
    if "1" in wait:
        assert out.isnan().all()
    else:
        assert torch.equal(out.view(-1, 2), words.view(-1, 2).flip(1))


def test_stray_accesses_and_unknown_instructions() -> None:
    words = torch.zeros(31, dtype=torch.int32)
    for body in ("ld.global.b32 %r3, [%rd4]", "st.global.b32 [%rd4], %r1", "st.shared.b32 [%r2], %r1"):
        with pytest.raises(MemoryFault, match="outside of"):
            run(body, words, torch.zeros(32), shared=124)
    with pytest.raises(MemoryFault, match="not aligned"):
        run("ld.global.b32 %r3, [%rd1+2]", words, words)
    with pytest.raises(NotEmulatedError, match=r"popc\.b32 %r3, %r1"):
        run("popc.b32 %r3, %r1", words, words)
    out = torch.zeros(32)
    run("ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd5], %r3", words, out, shared=128)
    assert out.isnan().all()


def test_programs_that_wait_for_ever_fail() -> None:
    body = "$SPIN:; ld.global.gpu.acquire.b32 %r5, [%rd2+0]; setp.lt.u32 %p2, %r5, 2; @%p2 bra $SPIN"
    with pytest.raises(TimeoutError):
        run(body, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
