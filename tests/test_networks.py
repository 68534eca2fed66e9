"""Networks as people write them, read in place as velocity fields."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from tests.judge import assert_agree


class Wrapped(nn.Module):
    """An actor as people write it, with the stack under other names."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.mean_net = nn.Sequential(nn.Identity(), stack)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean_net(x)


@pytest.mark.parametrize("order", [("cond", "x", "t"), ("x", "t", "cond"), ("t", "cond", "x")])
def test_pack_mlp_reads_what_people_have(order: tuple[str, ...]) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.SiLU(),
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.LayerNorm(8)),
        nn.Linear(8, 2),
    )
    inputs = {"x": torch.randn(4, 2), "t": torch.rand(4, 1), "cond": torch.randn(4, 3)}
    net, inputs = net.double(), {name: tensor.double() for name, tensor in inputs.items()}
    packed = fdkernels.pack_mlp(Wrapped(net), order)
    expected = net(torch.cat([inputs[name] for name in order], dim=-1))
    torch.testing.assert_close(packed(**inputs), expected)
    field = packed.read(torch.float64, torch.float64).field(inputs["cond"])
    torch.testing.assert_close(field(inputs["x"], inputs["t"]), expected)


def assert_the_module_decides(flow: nn.Module, x0: Tensor, cond: Tensor) -> None:
    exact = copy.deepcopy(flow).double()
    truth = fdkernels_ref.integrate_flow(exact, x0.double(), cond.double())
    plain = fdkernels_ref.integrate_flow(flow, x0, cond)
    assert_agree(fdkernels.integrate_flow(flow, x0, cond), plain, truth)


def test_a_layer_put_in_later_is_seen() -> None:
    """The result of packing is kept only while the module consists of the same layers."""
    flow, x0, cond = fdkernels.VelocityMLP(3, 2, hidden=(8, 8)), torch.randn(4, 2), torch.randn(4, 3)
    assert fdkernels.pack_mlp(flow) is fdkernels.pack_mlp(flow)
    copied = copy.deepcopy(flow)
    for i, replacement in ((1, nn.Tanh()), (2, nn.Linear(8, 8)), (3, nn.Sequential(nn.ReLU()))):
        flow.net[i] = replacement
        assert_the_module_decides(flow, x0, cond)
    flow.net[3][0] = nn.SiLU()
    flow.net[1] = nn.GELU()
    assert fdkernels.pack_mlp(flow).layers[0].activation == "gelu"
    flow.net[1].approximate = "tanh"
    assert fdkernels.pack_mlp(flow).layers[0].activation == "gelu_tanh"
    dropping = fdkernels.VelocityMLP(3, 2, hidden=(8,))
    dropping.net.insert(1, nn.Dropout().eval())
    fdkernels.pack_mlp(dropping)
    with pytest.raises(TypeError, match="Dropout"):
        fdkernels.pack_mlp(dropping.train())
    assert_the_module_decides(flow, x0, cond)
    assert_the_module_decides(copied, x0, cond)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + super().forward(x)


class Squashed(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.mean_net(x).tanh()


class Doubled(fdkernels.VelocityMLP):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, cond)


def test_what_a_layer_does_before_its_product_is_done() -> None:
    """Calling a packed module runs the layers themselves, with their hooks and with activations set later."""
    flow, rows = fdkernels.VelocityMLP(3, 2, hidden=(8, 8)), (torch.randn(4, 2), torch.rand(4, 1), torch.randn(4, 3))
    packed = fdkernels.pack_mlp(flow.net)
    before = packed(*rows)
    flow.net[2].register_forward_pre_hook(lambda layer, given: (given[0] * 2,))
    assert not torch.allclose(packed(*rows), before)
    torch.testing.assert_close(packed(*rows), flow(*rows))
    flow.net[1].approximate = "none"
    torch.testing.assert_close(flow.net[1](rows[0]), torch.nn.functional.gelu(rows[0]))
    assert not torch.equal(flow.net[1](rows[0]), torch.nn.functional.gelu(rows[0], approximate="tanh"))


def test_a_forward_of_ones_own_is_never_passed_over() -> None:
    stack = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    for module, part in ((Squashed(stack), "arithmetic with a constant"), (Residual(*stack), "a residual connection")):
        with pytest.raises(TypeError, match=part):
            fdkernels.pack_mlp(module)
    flow, x0, cond = Doubled(3, 2, hidden=(8,)), torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="Doubled cannot be read as an MLP because of arithmetic with a constant"):
        fdkernels.pack_mlp(flow)
    assert_the_module_decides(flow, x0, cond)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)), "Softmax"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(9, 2)), "widths do not chain"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), "begin and end"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 2)), "at most norm, activation, norm"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(4), nn.Linear(8, 2)), "must normalise"),
        (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), "must take"),
        (nn.Bilinear(2, 2, 2), "order must say which inputs of module's forward"),
    ],
)
def test_pack_mlp_refuses_the_rest(module: nn.Module, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fdkernels.pack_mlp(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fdkernels.VelocityMLP(-1, 2), "cond_dim must be an integer of at least 0"),
        (lambda: fdkernels.VelocityMLP(1, 2, activation="unheard of"), "activation must be one of"),
        (lambda: fdkernels.pack_mlp(fdkernels.VelocityMLP(5, 6, hidden=(8,)).net, ("cond", "x")), "order must name"),
    ],
)
def test_bad_settings(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
