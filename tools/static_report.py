"""What the kernels compile to, without a GPU: registers, spills, shared memory, width of loads.

python tools/static_report.py           # a table
python tools/static_report.py --json    # a list of rows
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch

from fdkernels.kernels.flow import gemm
from fdkernels.kernels.flow import launch as flow_launch
from tools.aot import ARCHITECTURES, DTYPES, Compiler
from tools.cases import SHAPES, calls, flow_calls, flow_cases


def report(architectures: list[str], dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    for architecture, dtype in itertools.product(architectures, dtypes):
        with Compiler(architecture) as compiler:
            for num_samples, d in SHAPES:
                for name, launcher, args in calls(dtype, num_samples, d):
                    row = {"kernel": name, "arch": architecture, "dtype": DTYPES[dtype], "K": num_samples, "d": d}
                    yield from (row | found for found in compiler.compile(launcher, args))
            for case in flow_cases(architecture, dtype):
                torch.set_float32_matmul_precision("high" if case.precision == "high" else "highest")  # for "gemm"
                for name, launcher, args in flow_calls(case, dtype):
                    row = {"kernel": f"{name} {case.implementation} {case.rows}", "arch": architecture}
                    row |= {"dtype": DTYPES[dtype], "K": case.num_samples, "d": case.d, "case": case._asdict()}
                    for turn, found in enumerate(compiler.compile(launcher, args, flow_launch, gemm)):
                        several = {"kernel": f"{row['kernel']} turn {turn}"} if case.implementation == "gemm" else {}
                        yield row | found | several


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
