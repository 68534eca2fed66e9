"""Which methods are fast on this CPU, as PyTorch and oneDNN report it. Nothing is timed, so runs give equal numbers.

Without gradients (``field.py``):

========================================  ============================================================================
few rows                                  PyTorch's own functions, as few as possible: calling them takes most time
AVX-512, or half precision with           oneDNN's products, which apply bias and activation to a block while it is in
hardware units                            the cache
AVX2 or less                              products into fresh memory (AMD: oneDNN's) or into buffers that all steps
                                          share (PyTorch's); activations in place
half precision without hardware units     float32 products of operands rounded to half precision
========================================  ============================================================================

With gradients (``layers.py``):

========================================  ============================================================================
AMD                                       oneDNN's products, network by network; tanh-GELU through a sigmoid
Intel with AVX-512                        PyTorch's own functions; twin networks as one batched product
others                                    the same, but tanh-GELU through a sigmoid
========================================  ============================================================================

PyTorch multiplies with MKL, which on AMD processors uses AVX2 whatever they have, and not at its best. A product of 256
rows, 512 wide, on 2 threads of an EPYC 9005 takes 0.63 ms; oneDNN's takes 0.29, or 0.54 if held to AVX2. PyTorch's tanh
makes GELU slow: 78 µs for those rows, 34 through a sigmoid; its gradient takes 83 and 43.

A hidden layer for these rows with AVX2 alone (EPYC 7003, 2 threads) takes 0.95 ms for MKL's product; with tanh-GELU it
takes 1.07 in place, 1.25 with PyTorch's own, and 1.58 fused by oneDNN, whose tanh then gathers from a table. PyTorch's
bfloat16 product takes 130 ms on a processor without units for it.
"""

from __future__ import annotations

import functools

import torch

from fdkernels.torch_private import half_units, has_onednn


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are worth it: the processor has units for them, and PyTorch uses these."""
    return dtype not in (torch.bfloat16, torch.float16) or half_units(dtype)


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_multiplies() -> bool:
    """Whether oneDNN's float32 product is faster than PyTorch's."""
    return _is_amd() and torch.backends.mkl.is_available() and has_onednn()


def sigmoid_is_fast() -> bool:
    """Whether a sigmoid and the products around it take less time than PyTorch's tanh-GELU."""
    return _is_amd() or not has_avx512()


def name() -> str:
    """The processor's, if PyTorch reports it: 2.11 does, 2.9 does not."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", ""))


@functools.cache
def _is_amd() -> bool:
    """A processor that is not reported is taken to suit PyTorch's own functions."""
    return name().startswith("AMD")
