"""What is fast on this CPU. It is asked of PyTorch and of oneDNN, and never timed, so that a run gives the same numbers
each time.

Where nobody differentiates (``field.py``):

========================================  ============================================================================
few rows                                  PyTorch's own functions, as few as can be: calling them is what takes time
AVX-512, and half precision with units    oneDNN's products, which apply bias and activation to a block while that is
for it                                    in the cache
AVX2, or neither                          products into fresh memory (AMD: oneDNN's) or into buffers that all steps
                                          share (PyTorch's), activations in place
half precision without units              float32 products of operands that were rounded to half precision
========================================  ============================================================================

With gradients (``layers.py``):

========================================  ============================================================================
AMD                                       oneDNN's products, network by network; tanh-GELU by a sigmoid
Intel with AVX-512                        PyTorch's own functions, twin networks as one batched product
others                                    the same, with tanh-GELU by a sigmoid
========================================  ============================================================================

PyTorch multiplies with MKL, which takes AVX2 on AMD's processors whatever they have, and not the best of it. 256 rows,
512 wide, 2 threads of an EPYC 9005: 0.63 ms, oneDNN's 0.29, held to AVX2 0.54. Its tanh is what makes GELU long: 78 µs
of those rows, by a sigmoid 34; the gradient 83 and 43.

A hidden layer of these rows, with AVX2 alone (EPYC 7003, 2 threads): 0.95 ms MKL's product, 1.07 with tanh-GELU in
place, 1.25 with PyTorch's own, 1.58 with oneDNN's fused one, whose tanh gathers from a table there. PyTorch's bfloat16
product takes 130 ms where the processor has no units for it.
"""

from __future__ import annotations

import functools

import torch

from fdkernels.torch_private import half_units, has_onednn


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are worth it: the processor has units for them, and PyTorch uses those."""
    return dtype not in (torch.bfloat16, torch.float16) or half_units(dtype)


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_multiplies() -> bool:
    """Whether oneDNN's float32 product is faster than PyTorch's."""
    return _is_amd() and torch.backends.mkl.is_available() and has_onednn()


def sigmoid_is_fast() -> bool:
    """Whether a sigmoid and the products around it take less time than PyTorch's tanh-GELU."""
    return _is_amd() or not has_avx512()


@functools.cache
def _is_amd() -> bool:
    """PyTorch 2.11 tells, 2.9 does not; what does not tell is taken for what PyTorch was made for."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", "")).startswith("AMD")
