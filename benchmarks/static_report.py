"""What the compilers make of the kernels, without a GPU: registers, spills, shared memory, width of loads.

    python benchmarks/static_report.py           # a table
    python benchmarks/static_report.py --json    # a list of rows

Calls the launchers with the kernels replaced by a recorder that compiles what it is asked to launch, ahead of time, for
each architecture; so what is measured is what would run. Must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
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
from fdkernels.kernels.tuning.table import TABLE, Gpu
from fdkernels.layers import EncodedNetwork, Layer, Norm, encode
from fdkernels.records import Affine, Chain, Noise, PenaltyRule, TimedAffine, Way
from fdkernels.solvers import Solver

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
INTEGERS = {bool: "i1", int: "i32", float: "fp32"}
# (K, d): the sizes of the method, rows that no vector divides, one number a row, and rows walked over in blocks of K.
SHAPES = [(4, 6), (4, 8), (1, 1), (5, 7), (3, 17), (16, 60), (256, 1023), (256, 1024)]
NUM_ROWS = 4096
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def calls(dtype: torch.dtype, num_samples: int, d: int) -> Iterator[tuple[str, Any, tuple]]:
    """Every launcher on tensors of one dtype."""
    displacement = torch.empty(NUM_ROWS, d, dtype=dtype, device="meta")
    score = torch.empty(NUM_ROWS, num_samples, d, dtype=dtype, device="meta")
    trace = torch.empty(NUM_ROWS, device="meta")
    pairs = torch.empty(NUM_ROWS, num_samples, 2, device="meta")
    rule, affine, by_row = PenaltyRule(1e-3, True, 1e-6), Affine(None, 1.0, 0.0, True), Affine(pairs, 1.0, 0.0, True)
    yield "penalty", penalty_launch.penalty, (displacement, score, rule, False, False)
    yield "penalty+gradient", penalty_launch.penalty, (displacement, score, rule, True, True)
    velocity = (displacement, score, score, by_row, rule, True)
    yield "velocity_penalty+gradient", penalty_launch.velocity_penalty, velocity
    backward = (trace, displacement, score, trace, trace, rule)
    yield "penalty_score_gradient", penalty_launch.score_gradient, backward
    yield "score", score_launch.score, (score, score, affine)
    yield "score+times", score_launch.score, (score, score, by_row)


class FlowCase(NamedTuple):
    """A network and what is asked of it, with the entry of the table that it takes."""

    implementation: str
    precision: str
    rows: int = 256
    width: int = 512
    depth: int = 4
    cond_dim: int = 17
    d: int = 6
    norm: str = "none"
    models: int = 1
    num_samples: int = 4
    seed: bool = False
    times: bool = False
    half_weights: bool = True
    shipped: bool = False
    """Whether the table's entry was chosen for this size; the others only have to compile, and to fit."""

    def network(self, weights: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> EncodedNetwork:
        """One of these weights and biases; where there is a norm, a layer's bias is its scale and shift too."""
        layers = [Layer(weight, bias, activation="gelu_tanh") for weight, bias in weights]
        if self.norm != "none":
            norms = [Norm(layer.bias, layer.bias, 1e-6) for layer in layers]
            layers = [layer._replace(**{f"norm_{self.norm}": norm}) for layer, norm in zip(layers, norms)]
        return encode(layers, ("cond", "x", "t") if self.cond_dim else ("x", "t"))


def flow_cases(architecture: str, dtype: torch.dtype) -> Iterator[FlowCase]:
    """The sizes that the table was made for, and what else the kernels serve."""
    precision = "high" if dtype == torch.float32 else "bf16" if dtype == torch.bfloat16 else "fp16"
    for entry in TABLE.get(architecture, {}).get("flow", []):
        named = {"half": precision if dtype.itemsize == 2 else "bf16"}.get(entry["precision"], entry["precision"])
        if (entry["precision"] == "half") == (dtype.itemsize == 2):
            yield FlowCase(entry["implementation"], named, entry["problem_rows"], entry["width"], shipped=True)
    streamed = FlowCase("streamed", precision)
    yield streamed._replace(width=300)
    yield streamed._replace(cond_dim=0, depth=1, seed=True)
    yield streamed._replace(d=128, times=True)
    yield streamed._replace(norm="after", models=8)
    yield streamed._replace(norm="before", num_samples=5)
    if architecture == "sm_90":
        yield FlowCase("stationary", precision, d=64, cond_dim=0, seed=True)
        yield FlowCase("stationary", precision, rows=512, models=2, times=True, half_weights=False)


def flow_calls(case: FlowCase, dtype: torch.dtype) -> Iterator[tuple[str, Any, tuple]]:
    """The solve, all states of it where the times vary, and the chain to the penalty."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = dtype if case.half_weights else torch.float32
    width, depth, cond_dim, d, models = case.width, case.depth, case.cond_dim, case.d, case.models
    sizes = [(width, cond_dim + d + 1), *[(width, width)] * (depth - 1), (d, width)]
    network = case.network([(empty(*size, dtype=weights), empty(size[0], dtype=weights)) for size in sizes])
    if models > 1:
        stacked = [None if p is None else p.expand(models, *p.shape).contiguous() for p in network.parameters]
        network = network._replace(parameters=stacked)
    rows = empty(models, case.rows, d)
    cond = empty(models, case.rows, cond_dim) if cond_dim else None
    solver, way = Solver([0.0, 1.0], "euler", -1.0, 1.0, "end"), Way(case.precision, case.implementation)
    yield "flow", flow_launch.integrate, (rows, cond, network, solver, case.times, way)
    states = empty(models, max(1, case.rows // case.num_samples), d)
    noise = None if case.seed else empty(models, states.shape[1] * case.num_samples, d)
    obs = None if cond is None else cond[:, : states.shape[1]].contiguous()
    seed = empty(dtype=torch.int64) if case.seed else None
    triples = empty(models, states.shape[1] * case.num_samples, 3, dtype=torch.float32) if case.times else None
    drawn, at = Noise(noise, noise, seed, case.num_samples), TimedAffine(triples, 0.95, 19.0, -20.0, True)
    rule = PenaltyRule(1e-3, True, 1e-6)
    yield "chain", flow_launch.fisher, (Chain(drawn, obs, states, at, network, solver, rule, case.times, way),)


class Build(NamedTuple):
    compiled: Any
    arguments: list[Any]
    """Those that the compiled kernel takes, in its order; scratch that Triton adds comes after."""
    integers: dict[str, int]
    """Constants by name."""
    num_warps: int


class AheadOfTime:
    """Stands in for a kernel: ``kernel[grid](...)`` compiles it for ``target`` and notes what came out."""

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
                aligned[path] = [["tt.divisibility", 16]]  # what the allocator gives
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
        named |= named["PLAN"]._asdict() if "PLAN" in named else {}
        integers = {name: value for name, value in named.items() if type(value) is int}
        return Build(compiled, passed, integers, options["num_warps"])


def inspect_cuda(asm: dict[str, Any]) -> dict[str, int]:
    """The kernels here keep nothing on the stack but what spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (?:0x)?(\w+)", asm["ptx"])  # to shared memory, bytes
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


def report(architectures: list[str], dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    for architecture, dtype in itertools.product(architectures, dtypes):
        with Compiler(architecture) as compiler:
            for num_samples, d in SHAPES:
                for name, launcher, args in calls(dtype, num_samples, d):
                    row = {"kernel": name, "arch": architecture, "dtype": DTYPES[dtype], "K": num_samples, "d": d}
                    yield from (row | found for found in compiler.compile(launcher, args))
            for case in flow_cases(architecture, dtype):
                torch.set_float32_matmul_precision("high" if case.precision == "high" else "highest")  # of "gemm"
                for name, launcher, args in flow_calls(case, dtype):
                    row = {"kernel": f"{name} {case.implementation} {case.rows}", "arch": architecture}
                    row |= {"dtype": DTYPES[dtype], "K": case.num_samples, "d": case.d, "case": case._asdict()}
                    for turn, found in enumerate(compiler.compile(launcher, args, flow_launch, gemm)):
                        several = {"kernel": f"{row['kernel']} turn {turn}"} if case.implementation == "gemm" else {}
                        yield row | found | several


class Compiler:
    """Within it, launchers compile for an architecture what they would launch on it."""

    def __init__(self, architecture: str, stand_in: type[AheadOfTime] = AheadOfTime) -> None:
        self.kernels = {
            (module, name): stand_in(getattr(module, name), ARCHITECTURES[architecture])
            for module, names in KERNELS.items()
            for name in names
        }
        self.patches = contextlib.ExitStack()
        self.architecture = architecture

    def __enter__(self) -> Compiler:
        for (module, name), kernel in self.kernels.items():
            self.patches.enter_context(mock.patch.object(module, name, kernel))
        for module in (penalty_launch, score_launch, flow_launch):
            self.patches.enter_context(mock.patch.object(module, "gpu_of", return_value=Gpu("", self.architecture)))
        processors = MULTIPROCESSORS[self.architecture]
        self.patches.enter_context(mock.patch.object(flow_launch, "multiprocessors", return_value=processors))
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def compile(self, launcher: Any, args: tuple, *modules: Any) -> list[dict[str, Any]]:
        """What came out, a row for each launch; only of kernels that these modules launch, where some are given."""
        for kernel in self.kernels.values():
            kernel.found = []
        launcher(*args)
        looked_at = [kernel for (module, _), kernel in self.kernels.items() if module in (modules or KERNELS)]
        return [row for kernel in looked_at for row in kernel.found]


KERNELS = {
    penalty_launch: ("penalty_kernel", "score_gradient_kernel"),
    score_launch: ("score_kernel",),
    flow_launch: ("flow_kernel",),
    gemm: ("turn_kernel",),
}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    names = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
    parser.add_argument("--dtype", nargs="+", default=list(names), choices=names)
    args = parser.parse_args(arguments)
    rows = report(args.arch, [names[name] for name in args.dtype])
    if args.json:
        print(json.dumps(list(rows), indent=1))
        return
    hidden = {*"KD", "BLOCK_D", "BLOCK_K"}
    columns = [("arch", 8), ("dtype", 6), ("K", 5), ("d", 6), ("regs", 6), ("spilled", 8), ("shared", 8), ("load", 6)]
    print(f"{'kernel':26}" + "".join(f"{title:>{width}}" for title, width in columns) + "  mma  config")
    for row in rows:
        config = " ".join(f"{name}={value}" for name, value in row["config"].items() if name not in hidden)
        print(
            f"{row['kernel']:26}{row['arch']:>8}{row['dtype']:>6}{row['K']:5}{row['d']:6}{row['registers']:6}"
            f"{row['spilled_bytes']:8}{row['shared_bytes']:8}{row['widest_load_bits']:6}{row['mma']:5}  {config}",
            flush=True,
        )


if __name__ == "__main__":
    main()
