"""Which methods are fast on this CPU, as PyTorch and oneDNN report it. Nothing is timed, so runs give equal numbers.

Without gradients (``field.py``):

========================================  ============================================================================
few rows                                  PyTorch's own functions, as few as possible: calling them takes most time
AVX-512, or half precision with           oneDNN's products, which apply bias and activation to a block while it is in
hardware units                            the cache
AVX2 or less                              activations in place; on AMD, oneDNN's products of many rows; else PyTorch's,
                                          into buffers that all steps share
half precision without hardware units     float32 products of operands rounded to half precision
========================================  ============================================================================

With gradients (``layers.py``):

========================================  ============================================================================
products                                  oneDNN's on AMD with AVX-512, else PyTorch's
twin networks                             one by one on AMD, else as one batched product
tanh-GELU                                 PyTorch's on Intel with AVX-512, else through a sigmoid
========================================  ============================================================================

PyTorch multiplies with MKL, which on AMD processors uses AVX2 whatever they have. A product of 256 rows, 512 wide, on 2
threads of an EPYC 9005 takes 0.63 ms, and oneDNN's 0.29 with AVX-512. On an EPYC 7003, which has AVX2 alone, both take
about 1.0 ms, but a weight's gradient takes oneDNN 1.4 and MKL 1.0. From about a thousand rows MKL falls behind there.

PyTorch's tanh makes GELU slow: on the EPYC 9005 78 µs for those rows, 34 through a sigmoid, its gradient 83 and 43; on
the EPYC 7003 259 and 131, 275 and 91. There a hidden layer takes 1.07 ms with GELU in place, and 1.58 with the one that
oneDNN fuses, whose tanh gathers from a table. PyTorch's bfloat16 product takes 130 ms where there are no units for it.
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
    return is_amd() and has_avx512() and torch.backends.mkl.is_available() and has_onednn()


def sigmoid_is_fast() -> bool:
    """Whether a sigmoid and the products around it take less time than PyTorch's tanh-GELU."""
    return is_amd() or not has_avx512()


def name() -> str:
    """The processor's, if PyTorch reports it: 2.11 does, 2.9 does not."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", ""))


@functools.cache
def is_amd() -> bool:
    """A processor that is not reported is taken to suit PyTorch's own functions."""
    return name().startswith("AMD")
