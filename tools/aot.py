"""Ahead-of-time compilation of the kernels, as their launchers would launch them, on a machine without a GPU.

Launchers run with their kernels replaced by a stand-in, which compiles each launch for an architecture. So the code
that is inspected here, or emulated in ``tools/ptx``, is the code that would run. Not for use under TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fdkernels.kernels.flow import gemm
from fdkernels.kernels.flow import launch as flow_launch
from fdkernels.kernels.penalty import launch as penalty_launch
from fdkernels.kernels.score import launch as score_launch
from fdkernels.kernels.tuning.table import Gpu

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}
KERNELS = {
    penalty_launch: ("penalty_kernel", "score_gradient_kernel"),
    score_launch: ("score_kernel",),
    flow_launch: ("flow_kernel", "jacobian_kernel"),
    gemm: ("turn_kernel",),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
INTEGERS = {bool: "i1", int: "i32", float: "fp32"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiler:
    """A context in which launchers compile their kernels for an architecture instead of launching them."""

    def __init__(self, architecture: str, stand_in: type[AheadOfTime] | None = None) -> None:
        self.kernels = {
            (module, name): (stand_in or AheadOfTime)(getattr(module, name), ARCHITECTURES[architecture])
            for module, names in KERNELS.items()
            for name in names
        }
        self.patches = contextlib.ExitStack()
        self.architecture = architecture

    def __enter__(self) -> Compiler:
        for (module, name), kernel in self.kernels.items():
            self.patches.enter_context(mock.patch.object(module, name, kernel))
        for module in (module for module in KERNELS if hasattr(module, "gpu_of")):
            self.patches.enter_context(mock.patch.object(module, "gpu_of", return_value=Gpu("", self.architecture)))
        processors = MULTIPROCESSORS[self.architecture]
        self.patches.enter_context(mock.patch.object(flow_launch, "multiprocessors", return_value=processors))
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def compile(self, launcher: Any, args: tuple, *modules: Any) -> list[dict[str, Any]]:
        """One row of results per launch. ``modules`` limits the rows to the kernels that these modules launch."""
        for kernel in self.kernels.values():
            kernel.found = []
        launcher(*args)
        looked_at = [kernel for (module, _), kernel in self.kernels.items() if module in (modules or KERNELS)]
        return [row for kernel in looked_at for row in kernel.found]


class Build(NamedTuple):
    compiled: Any
    arguments: list[Any]
    """Arguments of the compiled kernel, in order, without the scratch pointers that Triton appends."""
    integers: dict[str, int]
    """Integer constants by name."""
    num_warps: int


class AheadOfTime:
    """Stands in for a kernel: ``kernel[grid](...)`` compiles it for ``target`` and records the result."""

    def __init__(self, kernel: triton.JITFunction, target: GPUTarget) -> None:
        self.kernel, self.target = kernel, target
        self.found: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> AheadOfTime:
        return self

    def __call__(self, *args: Any, **given: Any) -> None:
        build = self.compile(args, given)
        inspect = inspect_cuda if self.target.backend == "cuda" else inspect_hip
        self.found.append(
            {
                "config": build.integers | {"num_warps": build.num_warps},
                "shared_bytes": build.compiled.metadata.shared,
                **inspect(build.compiled.asm),
            }
        )

    def compile(self, args: tuple, given: dict[str, Any]) -> Build:
        names = self.kernel.arg_names
        given |= dict(zip(names, args))
        options = {name: given.pop(name) for name in list(given) if name not in names}
        constants: dict[tuple[int, ...], Any] = {}
        aligned: dict[tuple[int, ...], list] = {}
        passed: list[Any] = []

        def type_of(path: tuple[int, ...], value: Any) -> Any:
            if isinstance(value, tuple):
                types = [type_of((*path, i), part) for i, part in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if value is None:
                constants[path] = None
                return "constexpr"
            passed.append(value)
            if isinstance(value, torch.Tensor):
                aligned[path] = [["tt.divisibility", 16]]  # as from PyTorch's allocator
                return "*" + DTYPES[value.dtype]
            return INTEGERS[type(value)]

        signature = {}
        for i, parameter in enumerate(self.kernel.params):
            if parameter.is_constexpr:
                signature[parameter.name], constants[(i,)] = "constexpr", given[parameter.name]
            else:
                signature[parameter.name] = type_of((i,), given[parameter.name])
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=self.target, options=options)
        named = {names[path[0]]: value for path, value in constants.items()}
        for record in ("PLAN", "TILE"):
            named |= named[record]._asdict() if record in named else {}
        integers = {name: value for name, value in named.items() if type(value) is int}
        return Build(compiled, passed, integers, options["num_warps"])


def inspect_cuda(asm: dict[str, Any]) -> dict[str, int]:
    """Counts the whole stack as spills, because these kernels keep nothing else there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (?:0x)?(\w+)", asm["ptx"])  # bytes to shared memory
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "widest_load_bits": max([int(n or 1) * int(bits) for n, bits in loads] + [8 * int(n, 16) for n in copies]),
        "mma": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\b", asm["ptx"])),
    }


def inspect_hip(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]
    loads = re.findall(r"(?:global|buffer|flat)_load_(dwordx?\d?|u?short|ubyte|sbyte)", text)
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),  # type: ignore[index]
        "spilled_bytes": 4 * sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)),
        "widest_load_bits": max(bits.get(load, 16) for load in loads),
        "mma": len(re.findall(r"\bv_mfma", text)),
    }
