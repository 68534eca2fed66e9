"""The allowed distance of floating-point results: twice the measured error of the plain maths in that precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BARS = {
    torch.float64: {"torch": 1e-12},
    torch.float32: {"torch": 1e-6, "triton": 1e-5},
    torch.bfloat16: {"torch": 1e-2, "triton": 1e-2},
    torch.float16: {"torch": 2e-3, "triton": 2e-3},
}


def with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The value, and its gradient with respect to each input."""
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    out = function(*inputs)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


def assert_close(name: str, out: Tensor, truth: Tensor, reference: Tensor, backend: str, size: Tensor) -> None:
    """Check that ‖out − truth‖ is at most twice the error of the plain maths in that precision, and below the bar.

    Args:
        truth: the exact result, in float64.
        reference: the plain maths in the precision of the inputs.
        size: the terms that are rounded, if they cancel. Errors are relative to the larger of its norm and truth's.
    """
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, wanted {tuple(truth.shape)}"
    assert not out.isnan().any(), f"{name}: NaN: unwritten output, or read beyond an input"
    scale = max(truth.norm().item(), size.double().norm().item(), 1e-300)
    number = torch.finfo(out.dtype)
    subnormal = number.smallest_normal * number.eps * out.numel() ** 0.5  # error due to the dtype's range
    error = max(0.0, (out.double().cpu() - truth).norm().item() - subnormal) / scale
    plain = (reference.double() - truth).norm().item() / scale
    bar = BARS[max(out.dtype, reference.dtype, key=lambda dtype: torch.finfo(dtype).eps)][backend]
    # The plain maths may overflow where ours does not. It may also be exact by chance, so a few roundings are allowed.
    assert not error > max(2 * plain, 8 * number.eps), f"{name}: error {error:.2e}, plain maths {plain:.2e}"
    assert error <= bar, f"{name}: error {error:.2e} above the bar {bar:.0e}"


def assert_agree(ours: Any, theirs: Any, truth: Any, bar: float = 1e-5) -> None:
    """Check that two ways to compute tensors, or trees of them, differ by at most twice the second way's error.

    Args:
        truth: the same computed in float64.
        bar: largest allowed error of the second way, relative to the truth.
    """
    for one, other, exact in zip(leaves(ours), leaves(theirs), leaves(truth), strict=True):
        assert one.shape == other.shape == exact.shape
        assert one.dtype == other.dtype
        size, number = exact.norm().item(), torch.finfo(other.dtype)
        off = (other.double().cpu() - exact.cpu()).norm().item()
        apart = (one.double() - other.double()).norm().item()
        assert off <= bar * size, f"off by {off:.2e} of {size:.2e}, above the bar {bar:.0e}"
        # a few roundings are allowed, because the second may be exact by chance
        assert apart <= max(2 * off, 8 * number.eps * size), f"{apart:.2e} apart, the second is off by {off:.2e}"


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and sequences."""
    if isinstance(tree, Tensor):
        yield tree.detach()
    else:
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves(branch)
