"""The kernels' operands of TF32 products, of which the hardware reads only 10 bits after the point; activations."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fdkernels.activations import ACTIVATIONS
from fdkernels.kernels.activate import activate
from fdkernels.kernels.flow.layers import operand
from tests.kernels.device import DEVICE


@triton.jit
def operand_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, operand(tl.load(x_ptr + i), tl.float32, PRECISION))


def as_operand(x: Tensor, precision: str) -> Tensor:
    x, out = x.to(DEVICE), torch.full_like(x, -1.0, device=DEVICE)
    operand_kernel[(1,)](x, out, len(x), precision)
    return out.cpu()


def test_tf32_operands_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * torch.exp(4 * torch.randn(4096, generator=generator))
    out = as_operand(x, "tf32")
    assert (out.view(torch.int32) & 0x1FFF == 0).all()
    unit = 2.0 ** (x.abs().log2().floor() - 10)
    error = (out - x) / unit
    assert error.abs().max() < 0.72
    assert error.pow(2).mean().sqrt() < 1.1 * 12**-0.5  # the error of rounding to the nearest
    relative = (out / x - 1).mean()
    assert relative.abs() < 0.05 * 2**-11  # truncation loses 0.72 of 2^-11 on average
    assert torch.equal(as_operand(x, "tf32x3"), x)


def test_what_is_read_whole_stays_what_it_is() -> None:
    mantissas = torch.arange(2**10, 2**11, dtype=torch.float32)
    for exponent in (-126, -20, 0, 115):
        x = torch.cat([mantissas, -mantissas]) * 2.0 ** (exponent - 10)
        assert torch.equal(as_operand(x, "tf32"), x)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(as_operand(special, "tf32").view(torch.int32), special.view(torch.int32))
    all_ones = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert as_operand(all_ones, "tf32").isnan().all()


@triton.jit
def activate_kernel(x_ptr, out_ptr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, 8)
    tl.store(out_ptr + at, activate(tl.load(x_ptr + at), ACTIVATION))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_a_branch(name: str) -> None:
    x = torch.tensor([-30.0, -2.0, -0.3, 0.0, 0.4, 1.7, 30.0, torch.nan], device=DEVICE)
    out = torch.empty_like(x)
    activate_kernel[(1,)](x, out, ACTIVATION=name)
    torch.testing.assert_close(out, ACTIVATIONS[name].module()(x), rtol=2e-6, atol=2e-6, equal_nan=True)


def test_an_unknown_activation_is_no_identity() -> None:
    x = torch.linspace(-2, 2, 8, device=DEVICE)
    with pytest.raises(Exception) as error:
        activate_kernel[(1,)](x, torch.empty_like(x), ACTIVATION="unheard of")
    said = [str(error.value), str(error.value.__cause__)]
    assert any("no kernel knows this activation" in text for text in said), said
