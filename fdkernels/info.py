"""What a report about wrong numbers or speed should say of the machine: ``python -m fdkernels.info``.

    python -m fdkernels.info            # versions, devices, and what the operators would use on each
    python -m fdkernels.info --torch    # the same, then what PyTorch collects for reports of its own

It reads settings and computes nothing. ``docs/versions.md`` lists the versions that are tested.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterator, Sequence

import torch
from torch.utils import collect_env

import fdkernels
from fdkernels.backend import INTERPRETER, choose_backend, float32_products
from fdkernels.cpu import processor
from fdkernels.kernels.tuning import table

PACKAGES = ("torch", "triton", "numpy", "einops")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "FDKERNELS_CONFIGS",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TRITON_INTERPRET",
)
"""Those that change which implementation runs, or its numbers."""


def report() -> str:
    """The lines that the command prints."""
    lines = [*_versions(), *_settings(), *_cpu(), *_gpus()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


Lines = Iterator[tuple[str, str]]


def _versions() -> Lines:
    yield "fdkernels", fdkernels.__version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _settings() -> Lines:
    yield "float32 products", f"{float32_products()} (torch.set_float32_matmul_precision)"
    for name in VARIABLES:
        if name in os.environ:
            yield name, shlex.quote(os.environ[name])


def _cpu() -> Lines:
    name = processor.name() or "not reported by this PyTorch"
    yield "CPU", f"{name}; {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield "  operators", "PyTorch; Triton's interpreter if asked" if INTERPRETER else "PyTorch"
    yield "  layers that learn", "oneDNN" if processor.onednn_multiplies() else "PyTorch's own"
    yield "  tanh-GELU", "through a sigmoid" if processor.sigmoid_is_fast() else "PyTorch's own"
    units = processor.multiplies(torch.bfloat16)
    yield "  bfloat16", "hardware units" if units else "no units: float32 products of rounded operands, no faster"


def _gpus() -> Lines:
    if not torch.cuda.is_available():
        yield "GPU", "none that PyTorch can use"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        gpu = table.gpu_of(device)
        yield f"GPU {index}", f"{gpu.name}, {gpu.family}"
        served = choose_backend("info", None, torch.empty(1, device=device)) == "triton"
        yield "  operators", "Triton" if served else "PyTorch, because triton is not installed"
        yield "  tiles", _tiles(gpu)


def _tiles(gpu: table.Gpu) -> str:
    if gpu.name in table.TABLE:
        return f"measured on this GPU ({table.user_file()})"
    if gpu.family in table.TABLE:
        return f"shipped for {gpu.family}; `python -m fdkernels.tune` measures this GPU"
    return "heuristics; `python -m fdkernels.tune` measures this GPU"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fdkernels.info", description="What a report of a problem should say of the machine."
    )
    parser.add_argument("--torch", action="store_true", help="add what PyTorch collects: drivers, libraries, processor")
    args = parser.parse_args(argv)
    print(report())
    if args.torch:
        print(f"\n{collect_env.get_pretty_env_info()}")


if __name__ == "__main__":
    main()
