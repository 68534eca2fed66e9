"""Normal random numbers that are a function of a seed and a position: the same on every device, in any order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.validation import FLOATING, brief, is_integer, is_sequence

_WORD = 0xFFFFFFFF
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_MAX_ELEMENTS, _MAX_DIMENSIONS = 2**31, 64


def philox_normal(
    seed: int | Tensor, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype, *, first: int = 0
) -> Tensor:
    """N(0, 1) numbers from the counter-based generator Philox-4x32-10.

    Element i of the flattened shape is what Triton's ``tl.randn(seed, first + i)`` gives, up to the rounding of log and
    cos: the first two words of Philox for the counter (first + i) become uniforms, and Box-Muller makes them normal.
    Calls whose ranges of positions do not overlap are independent. (Before Triton 3.4, ``tl.randn`` itself uses a
    generator with 64-bit words if positions are int64; the kernels here do not.)

    Args:
        seed: 64 bits: an int from -2^63 to 2^64 - 1, or a 0-d integer tensor on ``device``, whose value is not read by
            the host.
        shape: of the result.
        device, dtype: of the result. The numbers are made in float32 and then converted.
        first: position of the first element, at least 0.

    Raises:
        TypeError: an argument has the wrong type, such as a ``seed`` that is not an integer or an integer tensor.
        ValueError: ``seed``, ``shape`` or ``first`` is out of range, or a tensor seed has dimensions or is on another
            device.
        RuntimeError: there is no such device here, or no memory on it.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    op = "philox_normal"
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # whatever PyTorch has to say about a device
        raise RuntimeError(f"{op}: device must be one that is here, got {brief(device)} ({error})") from None
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {brief(dtype)}")
    seed = check_seed(op, seed, device)
    sizes = list(itertools.islice(shape, _MAX_DIMENSIONS + 1)) if is_sequence(shape) else [-1]
    if len(sizes) > _MAX_DIMENSIONS or not all(is_integer(size) and 0 <= size <= _MAX_ELEMENTS for size in sizes):
        raise ValueError(f"{op}: shape must be a sequence of sizes of at least 0, got {brief(shape)}")
    sizes = [int(size) for size in sizes]
    if math.prod(sizes) > _MAX_ELEMENTS:
        raise ValueError(f"{op}: shape must have at most {_MAX_ELEMENTS} elements, got {math.prod(sizes)}")
    if not is_integer(first) or not 0 <= first <= 2**63 - 1 - _MAX_ELEMENTS:
        raise ValueError(f"{op}: first must be an integer of at least 0 and below 2^63, got {brief(first)}")
    return draw(seed, sizes, device, dtype, int(first))


def draw(seed: int | Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype, first: int) -> Tensor:
    """``philox_normal`` on checked arguments."""
    position = torch.arange(first, first + math.prod(shape), dtype=torch.int64, device=device)
    zero = torch.zeros_like(position)
    words = philox((position & _WORD, position >> 32, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))
    radius, angle = _uniform(words[0]), _uniform(words[1])
    radius = torch.sqrt(-2 * torch.log(radius.clamp(min=1e-7)))
    return (radius * torch.cos(2 * math.pi * angle)).view(tuple(shape)).to(dtype)


def check_seed(op: str, seed: int | Tensor, device: torch.device) -> int | Tensor:
    """The seed as a signed 64-bit number or tensor."""
    if isinstance(seed, Tensor):
        if seed.dtype not in _INTEGERS or seed.layout != torch.strided or seed.is_nested:
            raise TypeError(f"{op}: seed must be an int or an integer tensor, dense, got a tensor of {seed.dtype}")
        if seed.ndim != 0:
            raise ValueError(f"{op}: a tensor seed must have no dimensions, got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"{op}: a tensor seed must be on {device}, where it is read, got {seed.device}")
        return seed.to(torch.int64)
    if not is_integer(seed):
        raise TypeError(f"{op}: seed must be an int or an integer tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must have 64 bits, got {brief(seed)}")
    seed = int(seed)
    return seed if seed < 2**63 else seed - 2**64


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on words that are int64 tensors with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words. Splitting the constant keeps int64 from overflowing."""
    high, low = word * (constant >> 16), word * (constant & 0xFFFF)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def _uniform(word: Tensor) -> Tensor:
    """A word as a number in [0, 1), as Triton does it: x as a signed word, or -x - 1 if x is negative, times 2^-31.

    The scale is a little below 2^-31, so that the largest word stays below 1.
    """
    return torch.minimum(word, word ^ _WORD).to(torch.float32) * 4.6566127342e-10
