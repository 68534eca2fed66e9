"""Good values and odd ones, each a text of Python that is evaluated in this module: a call that fails can be repeated.

from tests.fuzz.values import *  # and then the call as the failure prints it
"""

from __future__ import annotations

import array  # noqa: F401
import collections  # noqa: F401
from collections.abc import Sequence
from decimal import Decimal  # noqa: F401
from fractions import Fraction  # noqa: F401
from typing import Any

import numpy as np  # noqa: F401
import torch
from torch import Tensor, nn

import fdkernels
from fdkernels.philox import philox_normal  # noqa: F401

inf, nan = float("inf"), float("nan")


def tensor(shape: tuple[int, ...], dtype: str, how: str = "", seed: int = 0) -> Tensor:
    """Normal numbers in a layout: "strided", "transposed", "expanded" or none of them; with "grad" it requires one."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(getattr(torch, dtype))
    if "strided" in how and shape:
        out = torch.stack((out, out + 1), -1)[..., 0]
    if "transposed" in how and len(shape) > 1:
        out = out.mT.contiguous().mT
    if "expanded" in how and shape:
        out = out[..., :1].expand(shape)
    return out.requires_grad_("grad" in how)


def poke(given: Tensor, value: float) -> Tensor:
    """The same with one element set."""
    given = given.detach().clone()
    given.view(-1)[-1:] = value
    return given


def nested(given: Tensor) -> Tensor:
    return torch.nested.nested_tensor([given.detach(), given.detach()])


def quantized(given: Tensor) -> Tensor:
    return torch.quantize_per_tensor(given.detach().float(), 0.1, 0, torch.qint8)


class Own(Exception):
    """Raised by a user's function; it passes through as it is."""


class Raising:
    """Whatever one asks of it."""

    def _raise(self, *args: object) -> Any:
        raise Own("asked")

    __eq__ = __bool__ = __len__ = __repr__ = __str__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _raise
    __hash__ = __iter__ = __getitem__ = __contains__ = __index__ = _raise


class Lying:
    """Equal to everything, of length 2, and false."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __len__(self) -> int:
        return 2

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "x"


class LyingList(list):
    def __len__(self) -> int:
        return 2


class Endless(Sequence):
    """Says it has two items, and never runs out of them."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: Any) -> int:
        return 1


class Number(float):
    """A user's subclass of float."""


# -- velocities ------------------------------------------------------------------------------------------------------


def network(d: int, cond_dim: int, dtype: str = "float32", how: str = "", hidden: tuple[int, ...] = (5, 4)) -> Any:
    """A velocity: a VelocityMLP, or with "packed" its stack packed, with "norm" with layer norms."""
    rng = torch.random.get_rng_state()
    torch.manual_seed(d + 10 * cond_dim)
    with torch.device("cpu"):
        flow = fdkernels.VelocityMLP(cond_dim, d, hidden, "silu", layer_norm="norm" in how).to(getattr(torch, dtype))
    torch.random.set_rng_state(rng)
    return fdkernels.pack_mlp(flow.net, flow.order) if "packed" in how else flow


def field(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """A velocity that is a plain function."""
    return _field(x, t, cond, x.ndim)


def chunk_field(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """A velocity that is a plain function of chunks, which have one leading dimension."""
    return _field(x, t, cond, 2)


def _field(x: Tensor, t: Tensor, cond: Tensor | None, ndim: int) -> Tensor:
    v = torch.tanh(x) * (1 - t) - x
    if cond is None:
        return v
    if not isinstance(cond, Tensor) or cond.ndim != ndim:
        raise Own("this condition is not the field's")
    return v + cond.sum(-1).reshape(*cond.shape[:-1], *(1,) * (x.ndim - ndim + 1))


def raising(*args: object) -> Any:
    raise Own("called")


ODD_FIELDS = [
    "raising",
    "lambda x, t, cond: None",
    "lambda x, t, cond: 1.0",
    "lambda x, t, cond: [x]",
    "lambda x, t, cond: x[..., :0]",
    "lambda x, t, cond: x.unsqueeze(0)",
    "lambda x, t, cond: x.sum()",
    "lambda x, t, cond: x.double()",
    "lambda x, t, cond: torch.zeros_like(x, dtype=torch.float16)",
    "lambda x, t, cond: x.long()",
    "lambda x, t, cond: x > 0",
    "lambda x, t, cond: x.to(torch.complex64)",
    "lambda x, t, cond: x.to_sparse()",
    "lambda x, t, cond: x.to('meta')",
    "lambda x, t, cond: nested(x)",
    "lambda x, t, cond: quantized(x)",
    "lambda x, t, cond: x * nan",
    "lambda x, t, cond: x / 0",
    "lambda x, t, cond: x.expand(x.shape)",
    "lambda x, t, cond: nn.Parameter(x.detach())",
    "lambda x, t, cond: x.detach().numpy()",
    "network(3, 2)",
    "network(2, 0, 'float64')",
    "network(2, 2, 'bfloat16', 'packed')",
    "network(2, 0).to('meta')",
    "network(2, 2).to(torch.complex64)",
    "broken(network(2, 2), 2, nn.Linear(5, 4, device='meta'))",
    "broken(network(2, 2), 2, nn.Linear(5, 4, dtype=torch.float64))",
    "broken(network(2, 2), 2, nn.Linear(5, 4, dtype=torch.complex64))",
    "broken(network(2, 2), 2, nn.Linear(7, 4))",
    "broken(network(2, 2), 1, nn.Softmax(-1))",
]


def broken(flow: Any, i: int, module: nn.Module) -> Any:
    """The velocity, or the stack, with another layer in it."""
    (flow.net if isinstance(flow, fdkernels.VelocityMLP) else flow)[i] = module
    return flow


# -- odd values ------------------------------------------------------------------------------------------------------

NUMBERS = [
    "0", "1", "-1", "2", "3", "2**16 + 1", "2**31", "2**63", "2**64", "2**70", "-(2**70)", "10**400", "-(10**400)",
    "10**5000", "0.0", "-0.0", "0.5", "1.0", "1.5", "2.0", "-1.0", "5e-324", "1e-310", "1e-45", "1e-300", "1e300",
    "-1e300", "1e39", "7e4", "inf", "-inf", "nan", "1j", "complex(0.5, 0)", "True", "False", "Decimal('0.5')",
    "Decimal('nan')", "Fraction(1, 2)", "Fraction(10**5000, 3)", "Fraction(1, 10**5000)", "Number(0.5)",
    "np.float64(0.5)", "np.float32(0.5)", "np.float16(0.5)", "np.float32('nan')", "np.float16('inf')",
    "np.longdouble('1e4000')", "np.longdouble(0.5)", "np.int64(2)", "np.int8(2)", "np.uint8(2)", "np.uint8(255)",
    "np.int8(127)", "np.int64(-1)", "np.bool_(True)", "np.complex64(1)", "np.datetime64('2020')", "np.array(0.5)",
    "np.array([0.5])", "np.array([0.5, 1.0])", "np.array([])", "np.array('a')",
]  # fmt: skip
OBJECTS = [
    "None", "''", "'x'", "'linear'", "'trace'", "'none'", "'TRACE'", "np.str_('none')", "'\\ud800'", "b''", "b'ab'",
    "bytearray(b'ab')", "memoryview(b'ab')", "'x' * 10**5", "...", "NotImplemented", "object()", "int", "float", "len",
    "print", "lambda *args: 1", "raising", "Raising()", "Lying()", "LyingList()", "LyingList([0.0, 0.5, 1.0])",
    "Endless()", "[]", "()", "{}", "set()", "{0.0, 1.0}", "{'a': 1}", "{0: 0.0, 1: 1.0}", "[0.0]", "[0.0, 1.0]",
    "(0.0, 1.0)", "(1.0, 0.0)", "(-inf, inf)", "(nan, 1.0)", "(0.0, nan)", "(0, 10**400)", "(-1e300, 1e300)",
    "(-5e-324, 5e-324)", "(0.5, 0.5)", "(None, 1.0)", "('0', '1')", "(True, True)", "(0.0, 0.5, 1.0)", "[0.0, 0.0]",
    "[0.0, 1e300]", "[0.0, 7e4]", "[0.0, 10**400]", "[0.0, '1']", "[0.0, None]", "[[0.0], [1.0]]", "[0.0, 1j]",
    "[Fraction(1, 2), 1]", "[Decimal('0'), Decimal('1')]", "[Raising(), 1.0]", "[torch.tensor(0.0), 1.0]",
    "[1e-320, 2e-320]", "[i / 10 for i in range(11)]", "[0.0] * 70_000", "range(3)", "range(10**9)", "iter([0.0, 1.0])",
    "(x for x in [0.0, 1.0])", "collections.deque([0.0, 1.0])", "collections.UserList([0.0, 1.0])",
    "array.array('d', [0.0, 1.0])", "np.array([0.0, 1.0j])", "np.array([0, 1])", "np.array([[0.0, 1.0]])",
    "np.array([None, 1])", "np.array(['a', 'b'])", "np.float16([0, 1])", "torch.float32", "torch.int64",
    "torch.device('cpu')", "torch.device('meta')", "'cuda:99'", "'mps'", "'nonsense'", "torch.Generator()",
    "torch.Size([2])", "np.random.default_rng()", "nn.Identity()", "nn.Linear(2, 2)", "fdkernels", "torch.Tensor",
    "fdkernels.VelocityMLP",
]  # fmt: skip
TENSORS = [
    "torch.tensor(0.5)", "torch.tensor(3)", "torch.tensor(-1)", "torch.tensor(True)", "torch.tensor(1j)",
    "torch.tensor(nan)", "torch.tensor(2**40)", "torch.tensor(3, dtype=torch.uint8)", "torch.empty(0)",
    "torch.empty(0, 2)", "torch.empty(2, 0)", "torch.ones(1)", "torch.ones(2)", "torch.ones(2, 2)",
    "torch.ones(2, 3, 2)", "torch.tensor([0, 1])", "torch.tensor([0.0, 0.5, 1.0])", "torch.tensor([0.0, nan])",
    "torch.tensor([0.0, 1j])", "torch.tensor([0.0, 1.0], requires_grad=True)", "torch.tensor([0.0, 1.0]).to_sparse()",
    "torch.tensor([False, True])", "torch.ones(2, 2).to_sparse_csr()", "torch.ones(2, device='meta')",
    "torch.tensor(3, device='meta')", "torch.tensor(3).to_sparse()", "quantized(torch.ones(2))",
    "quantized(torch.tensor(3))", "nested(torch.ones(2))", "nested(torch.tensor(3))", "nn.Parameter(torch.ones(2))",
    "torch.ones(1).expand(5)", "torch.ones(2, dtype=torch.float8_e5m2)", "torch.ones(2, dtype=torch.bfloat16)",
]  # fmt: skip
ODD = [*NUMBERS, *OBJECTS, *TENSORS]

TURNED = [
    "({}).long()", "({}) > 0", "({}).to(torch.complex64)", "({}).to('meta')", "({}).to_sparse()",
    "({}).to_sparse_csr()", "nested({})", "quantized({})", "({}).unsqueeze(0)", "({}).unsqueeze(-1)", "({}).flatten()",
    "({})[..., :1]", "({})[..., :0]", "({})[:1]", "({})[:0]", "({})[0]", "({}).sum()", "({}).mT", "({}).tolist()",
    "({}).detach().numpy()", "({}).double()", "({}).float()", "({}).half()", "({}).bfloat16()",
    "({}).to(torch.float8_e5m2)", "nn.Parameter(({}).detach())", "({}).detach().requires_grad_()", "poke({}, nan)",
    "poke({}, inf)", "poke({}, -inf)", "({}) * 1e30", "({}) * 1e-30", "({}) * 0", "({}).repeat(2, 1)",
    "torch.cat([{}, {}], -1)", "({}).expand(2, *({}).shape)", "[{}]", "torch.zeros(()).expand(({}).shape)",
]  # fmt: skip
"""What becomes of a tensor."""

PATHS = [
    "fdkernels.AffinePath(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t))",
    "fdkernels.AffinePath(1, 2, 3, 4)",
    "fdkernels.AffinePath(None, lambda t: 1 - t, torch.ones_like, torch.ones_like)",
    "fdkernels.AffinePath(raising, raising, raising, raising)",
    *(
        f"fdkernels.AffinePath(lambda t: t, lambda t: {sigma}, torch.ones_like, lambda t: -torch.ones_like(t))"
        for sigma in (
            "None", "0.5", "t.expand(2, *t.shape)", "t.unsqueeze(0)", "t * 0", "t * nan", "t > 0",
            "(1 - t).to(torch.complex64)", "t.long() + 1", "(t * 0 + 1).to('meta')", "(1 - t).to_sparse()",
            "(1 - t).double()", "(1 - t).half()", "(1 - t).tolist()",
        )
    ),
]  # fmt: skip

# -- modules ---------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Wraps a module, and answers something else."""

    def __init__(self, inner: nn.Module, answer: Any) -> None:
        super().__init__()
        self.inner, self.answer = inner, answer

    def forward(self, rows: Tensor) -> Any:
        return self.answer


def itself() -> nn.Module:
    """A module that is its own child."""
    module = nn.Module()
    module.child = nn.Sequential()
    module.child.add_module("parent", module)
    return module


def filled(module: nn.Module, value: float) -> nn.Module:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module
