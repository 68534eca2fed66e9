"""The public operators on the PyTorch path, against the reference in float64 and against closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from tests.closed_forms import anisotropic_gaussian
from tests.kernels.judge import assert_close, with_gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_judged(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Values and all gradients of ``ours`` in ``dtype`` against the reference in float64, from the same inputs."""
    rounded = tuple(x.to(dtype) for x in inputs)
    truth = with_gradients(reference, tuple(x.double() for x in rounded))
    plain, out = with_gradients(reference, rounded), with_gradients(ours, rounded)
    names = ["value", *(f"gradient of argument {i}" for i in range(len(inputs)))]
    for name, *tensors in zip(names, out, truth, plain):
        # with d = 1 the normalised penalty does not depend on the scores at all: their gradient is rounding alone
        assert_close(name, *tensors, "torch", size=truth[0])


SHAPES = [((1,), 1, 1), ((5,), 4, 6), ((7,), 3, 17), ((2, 3), 1, 8), ((), 5, 2), ((33,), 9, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "k", "d"), SHAPES)
@pytest.mark.parametrize("normalize", ["trace", "none"])
def test_fisher_penalty(lead: tuple[int, ...], k: int, d: int, normalize: str, dtype: torch.dtype) -> None:
    torch.manual_seed(k * d)
    displacement, score = torch.randn(*lead, d), 3 * torch.randn(*lead, k, d)
    options = {"damping": 1e-2, "normalize": normalize}
    assert_judged(
        lambda x, s: fdkernels.fisher_penalty(x, s, **options),
        lambda x, s: fdkernels_ref.fisher_penalty(x, s, **options),
        [displacement, score],
        dtype,
    )


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 9),
    d=st.integers(1, 9),
    damping=st.sampled_from([0.0, 1e-3, 2.0]),
    eps=st.sampled_from([1e-6, 10.0]),
    transposed=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_fisher_penalty_anywhere(
    lead: list[int], k: int, d: int, damping: float, eps: float, transposed: bool, reduction: str
) -> None:
    displacement, score = torch.randn(*lead, d, dtype=torch.float64), torch.randn(*lead, k, d, dtype=torch.float64)
    if transposed:
        score = score.mT.contiguous().mT
        displacement = displacement.expand(2, *displacement.shape)[1]
    options = {"damping": damping, "eps": eps, "reduction": reduction}
    ours = fdkernels.fisher_penalty(displacement, score, **options)
    theirs = fdkernels_ref.fisher_penalty(displacement, score, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14, equal_nan=True)


def test_fisher_penalty_gradient_stops_at_the_floor() -> None:
    score = torch.full((1, 2, 3), 1e-5, dtype=torch.float64, requires_grad=True)
    displacement = torch.ones(1, 3, dtype=torch.float64)
    fdkernels.fisher_penalty(displacement, score, damping=0.0, eps=1.0).sum().backward()
    # on the ε branch the penalty is (1/K) Σ (s·δ)² / (ε d), whose derivative in s is 2 (s·δ) δ / (K ε d)
    torch.testing.assert_close(score.grad, torch.full_like(score, 2 * 3e-5 / (2 * 1.0 * 3)))


def test_fisher_penalty_passes_gradcheck() -> None:
    inputs = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(fdkernels.fisher_penalty, [x.requires_grad_() for x in inputs])


def test_a_bad_row_stays_alone() -> None:
    displacement, score = torch.randn(4, 3), torch.randn(4, 2, 3)
    clean = fdkernels.fisher_penalty(displacement, score)
    score[1, 0, 2], score[2, 1, 0] = torch.nan, torch.inf
    penalty = fdkernels.fisher_penalty(displacement, score)
    assert penalty[[1, 2]].isnan().all()
    assert torch.equal(penalty[[0, 3]], clean[[0, 3]])


def test_isotropic_scores_give_the_mean_square() -> None:
    displacement = torch.randn(5, 3, dtype=torch.float64)
    score = 2 * torch.eye(3, dtype=torch.float64).expand(5, 3, 3)
    penalty = fdkernels.fisher_penalty(displacement, score)
    torch.testing.assert_close(penalty, displacement.square().mean(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["linear", "linear_reversed", "vp", "cosine"])
@pytest.mark.parametrize("tensor_time", [False, True])
def test_velocity_to_score(path: str, tensor_time: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    velocity, x = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    t = torch.linspace(0.25, 0.75, 24).view(6, 4, 1) if tensor_time else 0.625
    assert_judged(
        lambda v, x: fdkernels.velocity_to_score(v, x, t, path=path),
        lambda v, x: fdkernels_ref.velocity_to_score(v, x, t if not tensor_time else t.to(v.dtype), path=path),
        [velocity, x],
        dtype,
    )


def test_velocity_convention() -> None:
    velocity, x = torch.randn(3, 2), torch.randn(3, 2)
    score = fdkernels.velocity_to_score(velocity, x, 0.75, convention="velocity")
    torch.testing.assert_close(score, 4 * velocity)
    with pytest.raises(ValueError, match="path='linear' only"):
        fdkernels.velocity_to_score(velocity, x, 0.75, convention="velocity", path="vp")


def test_a_path_of_ones_own() -> None:
    linear = fdkernels.AffinePath(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t))
    velocity, x = torch.randn(3, 2), torch.randn(3, 2)
    ours = fdkernels.velocity_to_score(velocity, x, 0.3, path=linear)
    torch.testing.assert_close(ours, fdkernels.velocity_to_score(velocity, x, 0.3))


def test_a_time_outside_the_path_gives_nan_not_a_number() -> None:
    t = torch.tensor([[-0.1], [0.5], [1.5]])
    score = fdkernels.velocity_to_score(torch.ones(3, 2), torch.ones(3, 2), t)
    assert score[[0, 2]].isnan().all()
    assert score[1].isfinite().all()


# -- flow ------------------------------------------------------------------------------------------------------------

FLOWS = {
    "plain": fdkernels.VelocityMLP(3, 2, hidden=(16, 8)),
    "layer_norm": fdkernels.VelocityMLP(3, 2, hidden=(16, 8), layer_norm=True, activation="silu"),
    "unconditional": fdkernels.VelocityMLP(0, 2, hidden=(16,), activation="tanh"),
    "deep": fdkernels.VelocityMLP(5, 3, hidden=(7, 9, 5, 4), activation="gelu"),
    "linear": fdkernels.VelocityMLP(1, 1, hidden=(), activation="relu"),
}


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("return_path", [False, True])
def test_integrate_flow(name: str, method: str, return_path: bool) -> None:
    flow = FLOWS[name].double()
    packed = fdkernels.pack_mlp(flow)
    x0 = torch.randn(4, 3, packed.action_dim, dtype=torch.float64)
    cond = torch.randn(4, 3, packed.cond_dim, dtype=torch.float64) if packed.cond_dim else None
    grid = [0.0, 0.1, 0.5, 0.45, 1.0]
    for options in (
        {"num_steps": 3},
        {"time_grid": grid},
        {"time_grid": torch.tensor(grid, dtype=torch.float64), "clip": None},
    ):
        theirs = fdkernels_ref.integrate_flow(
            flow, x0, cond, method=method, return_path=return_path,
            **({**options, "time_grid": grid} if "time_grid" in options else options),
        )  # fmt: skip
        for velocity in (flow, packed, lambda x, t, cond: flow(x, t, cond)):
            ours = fdkernels.integrate_flow(velocity, x0, cond, method=method, return_path=return_path, **options)
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_gradients_through_the_solver_only_when_asked() -> None:
    flow = fdkernels.VelocityMLP(3, 2, hidden=(8,)).double()
    x0 = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(5, 3, dtype=torch.float64)
    assert not fdkernels.integrate_flow(flow, x0, cond).requires_grad
    ours = fdkernels.integrate_flow(flow, x0, cond, differentiable=True).sum()
    theirs = fdkernels_ref.integrate_flow(flow, x0, cond).sum()
    inputs = [x0, *flow.parameters()]
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(method: str, order: int) -> None:
    # along the cosine path: on the linear one a Gaussian makes the midpoint rule third order
    gaussian = anisotropic_gaussian(3, path="cosine")
    x0 = torch.randn(64, 3, dtype=torch.float64)
    exact = gaussian.transport(x0, 0.0, 1.0)
    errors = [
        (fdkernels.integrate_flow(gaussian.velocity, x0, num_steps=s, method=method, clip=None) - exact).norm()
        for s in (64, 128, 256)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert torch.log2(coarse / fine).item() == pytest.approx(order, abs=0.15)


def test_an_optimiser_step_is_seen_by_the_next_call() -> None:
    net = nn.Sequential(nn.Linear(3 + 2 + 1, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 2))
    packed = fdkernels.pack_mlp(net)
    x0, cond = torch.randn(4, 2), torch.randn(4, 3)
    before = fdkernels.integrate_flow(packed, x0, cond, clip=None)
    with torch.no_grad():
        net[2].bias += 1.0
    after = fdkernels.integrate_flow(packed, x0, cond, clip=None)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, fdkernels.integrate_flow(fdkernels.pack_mlp(net), x0, cond, clip=None))


class Wrapped(nn.Module):
    """An actor as people write it: the stack hides under other names."""

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
    packed = fdkernels.pack_mlp(Wrapped(net), order)
    expected = net(torch.cat([inputs[name] for name in order], dim=-1))
    torch.testing.assert_close(packed(**inputs), expected)
    field = packed.read(torch.float32, torch.float32).field(inputs["cond"])
    torch.testing.assert_close(field(inputs["x"], inputs["t"]), expected)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + super().forward(x)


class Squashed(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.mean_net(x).tanh()


class Doubled(fdkernels.VelocityMLP):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, cond)


def test_a_forward_of_ones_own_is_never_passed_over() -> None:
    stack = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    for module in (Squashed(stack), Residual(*stack)):
        with pytest.raises(TypeError, match="computes something else"):
            fdkernels.pack_mlp(module)
    flow, x0, cond = Doubled(3, 2, hidden=(8,)), torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match="Doubled cannot be called with the concatenated inputs alone"):
        fdkernels.pack_mlp(flow)
    expected = fdkernels_ref.integrate_flow(flow, x0, cond)
    torch.testing.assert_close(fdkernels.integrate_flow(flow, x0, cond), expected.detach())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)), "Softmax"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(9, 2)), "widths do not chain"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), "begin and end"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 2)), "at most norm, activation, norm"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(4), nn.Linear(8, 2)), "must normalise"),
        (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), "must take"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ],
)
def test_pack_mlp_refuses_the_rest(module: nn.Module, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fdkernels.pack_mlp(module)


# -- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_time", [False, True])
@pytest.mark.parametrize("convention", ["exact", "velocity"])
def test_flow_fisher_penalty(convention: str, tensor_time: bool) -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(16, 16)).double()
    cond, displacement = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    noise, bridge = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    options = {
        "t": torch.rand(5, 7, 1, dtype=torch.float64) if tensor_time else 0.9,
        "num_steps": 4, "damping": 1e-2, "convention": convention,
        "noise": noise, "bridge_noise": bridge, "num_samples": 7,
    }  # fmt: skip
    for velocity in (flow, lambda x, t, cond: flow(x, t, cond)):
        ours, theirs = displacement.clone().requires_grad_(), displacement.clone().requires_grad_()
        penalty, score = fdkernels.flow_fisher_penalty(velocity, cond, ours, return_score=True, **options)
        expected, their_score = fdkernels_ref.flow_fisher_penalty(flow, cond, theirs, return_score=True, **options)
        torch.testing.assert_close(score, their_score)
        torch.testing.assert_close(penalty, expected)
        penalty.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert all(p.grad is None for p in flow.parameters())


def test_flow_fisher_penalty_meets_the_closed_form() -> None:
    gaussian = anisotropic_gaussian(3)
    torch.manual_seed(0)
    k, t = 20_000, 0.8
    displacement = torch.randn(4, 3, dtype=torch.float64)
    penalty = fdkernels.flow_fisher_penalty(
        gaussian.velocity, torch.zeros(4, 1, dtype=torch.float64), displacement,
        num_samples=k, t=t, num_steps=40, method="rk4", clip=None, damping=0.0, normalize="none",
    )  # fmt: skip
    precision = torch.linalg.inv(gaussian.covariance_t(t))
    exact = torch.einsum("bi,ij,bj->b", displacement, precision, displacement) / 3
    # (s·δ)² is exact·d times a χ² of one degree: relative standard error √(2/K)
    z = (penalty / exact - 1).abs() / (2 / k) ** 0.5
    assert (z < 4.5).all(), f"{z} standard errors"


def test_what_is_drawn_comes_from_the_generator() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8,))
    cond, displacement = torch.randn(5, 4), torch.randn(5, 3)
    first, again, other = (
        fdkernels.flow_fisher_penalty(flow, cond, displacement, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_chain_takes_other_precisions() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8,))
    cond, displacement, noise = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 2, 3)
    given = {"noise": noise, "bridge_noise": noise.flip(0)}
    expected = fdkernels.flow_fisher_penalty(flow, cond, displacement, t=0.75, **given)
    wide_time = torch.full((5, 1, 1), 0.75, dtype=torch.float64)
    torch.testing.assert_close(fdkernels.flow_fisher_penalty(flow, cond, displacement, t=wide_time, **given), expected)
    short = fdkernels.flow_fisher_penalty(flow, cond, displacement.bfloat16(), t=0.75, **given)
    torch.testing.assert_close(short, expected, rtol=2e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = fdkernels.flow_fisher_penalty(flow, cond, displacement, t=0.75, **given)
    torch.testing.assert_close(automatic.float(), expected, rtol=0.2, atol=0.02)
    low = fdkernels.VelocityMLP(4, 3, hidden=(8,)).bfloat16()
    assert fdkernels.integrate_flow(low, noise[:, 0].bfloat16(), cond.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, got noise of torch.float32"):
        fdkernels.integrate_flow(low, noise[:, 0], cond)


def test_spectrum_is_not_rounded_by_autocast() -> None:
    score = torch.randn(4, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fdkernels.fisher_spectrum(score)
    torch.testing.assert_close(rounded, fdkernels.fisher_spectrum(score))


def test_spectrum() -> None:
    score = torch.randn(4, 5, 3, dtype=torch.float64)
    fisher = fdkernels_ref.fisher_matrix(score, damping=0.1)
    torch.testing.assert_close(fdkernels.fisher_spectrum(score, damping=0.1), torch.linalg.eigvalsh(fisher).flip(-1))


def test_compiles_without_a_graph_break() -> None:
    flow = fdkernels.VelocityMLP(4, 3, hidden=(8,))

    def chain(cond: Tensor, displacement: Tensor, noise: Tensor) -> Tensor:
        action = fdkernels.integrate_flow(flow, noise[:, 0], cond, num_steps=3)
        penalty = fdkernels.flow_fisher_penalty(
            flow, cond, displacement, noise=noise, bridge_noise=noise.flip(0), num_steps=3
        )
        return penalty + action.sum(-1)

    inputs = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 2, 3)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), chain(*inputs))


# -- bad input -------------------------------------------------------------------------------------------------------

D, S = torch.randn(4, 6), torch.randn(4, 3, 6)
FLOW = fdkernels.VelocityMLP(5, 6, hidden=(8,))
BAD = {
    "no tensor": (lambda: fdkernels.fisher_penalty([1.0], S), TypeError, "displacement must be a torch.Tensor"),
    "integers": (lambda: fdkernels.fisher_penalty(D.long(), S), TypeError, "displacement must be float32.*int64"),
    "other d": (lambda: fdkernels.fisher_penalty(D, S[..., :5]), ValueError, r"d=6 .*got \(4, 3, 5\)"),
    "other rows": (lambda: fdkernels.fisher_penalty(D, S[:2]), ValueError, r"score must be \(\.\.\., K, d\)"),
    "no samples": (lambda: fdkernels.fisher_penalty(D, S[:, :0]), ValueError, "K of at least 1"),
    "no dimension": (lambda: fdkernels.fisher_penalty(D[:, :0], S[..., :0]), ValueError, "d of at least 1"),
    "devices": (lambda: fdkernels.fisher_penalty(D, S.to("meta")), ValueError, "one device"),
    "damping": (lambda: fdkernels.fisher_penalty(D, S, damping=-1e-3), ValueError, "damping must be"),
    "damping nan": (lambda: fdkernels.fisher_penalty(D, S, damping=float("nan")), ValueError, "damping must be"),
    "eps": (lambda: fdkernels.fisher_penalty(D, S, eps=0.0), ValueError, "eps must be finite and > 0"),
    "normalize": (lambda: fdkernels.fisher_penalty(D, S, normalize="det"), ValueError, "'trace', 'none', got 'det'"),
    "reduction": (lambda: fdkernels.fisher_penalty(D, S, reduction="max"), ValueError, "reduction must be one of"),
    "backend": (lambda: fdkernels.fisher_penalty(D, S, backend="cuda"), ValueError, "backend must be one of"),
    "triton": (lambda: fdkernels.fisher_penalty(D, S, backend="triton"), RuntimeError, "backend='triton'"),
    "t = 1": (lambda: fdkernels.velocity_to_score(D, D, 1.0), ValueError, r"some noise .* got t=1\.0"),
    "t = 0 reversed": (lambda: fdkernels.velocity_to_score(D, D, 0, path="linear_reversed"), ValueError, "some noise"),
    "t above": (lambda: fdkernels.velocity_to_score(D, D, 1.2), ValueError, r"t must lie in \[0, 1\], got 1\.2"),
    "t text": (lambda: fdkernels.velocity_to_score(D, D, "0.5"), TypeError, "t must be a number"),
    "t shape": (lambda: fdkernels.velocity_to_score(D, D, torch.rand(3, 1)), ValueError, "t must broadcast"),
    "x shape": (lambda: fdkernels.velocity_to_score(D, D[:2], 0.5), ValueError, "x must be velocity's shape"),
    "path": (lambda: fdkernels.velocity_to_score(D, D, 0.5, path="ve"), ValueError, "path must be an AffinePath or"),
    "steps": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(4, 5), num_steps=0), ValueError, "num_steps must"),
    "method": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(4, 5), method="rk5"), ValueError, "method must"),
    "grid": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(4, 5), time_grid=[0.0]), ValueError, "time_grid"),
    "clip": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(4, 5), clip=(1, -1)), ValueError, "low <= high"),
    "cond rows": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(3, 5)), ValueError, "leading shape"),
    "cond width": (lambda: fdkernels.integrate_flow(FLOW, D, torch.randn(4, 4)), ValueError, "width 5, got .* width 4"),
    "no cond": (lambda: fdkernels.integrate_flow(FLOW, D), ValueError, "width 5, got cond of width 0"),
    "x width": (lambda: fdkernels.integrate_flow(FLOW, D[:, :2], torch.randn(4, 5)), ValueError, "6 dimensions"),
    "velocity": (lambda: fdkernels.integrate_flow("flow", D), TypeError, "velocity must be"),
    "its shape": (lambda: fdkernels.integrate_flow(lambda x, t, c: x[:2], D), ValueError, "must return x's shape"),
    "K": (lambda: fdkernels.flow_fisher_penalty(FLOW, torch.randn(4, 5), D, num_samples=0), ValueError, "num_samples"),
    "noise": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, torch.randn(4, 5), D, noise=S, bridge_noise=S[:, :2]),
        ValueError,
        "bridge_noise must be",
    ),
    "widths": (lambda: fdkernels.VelocityMLP(-1, 2), ValueError, "cond_dim must be >= 0"),
    "activation": (lambda: fdkernels.VelocityMLP(1, 2, activation="mish"), ValueError, "activation must be one of"),
    "order": (lambda: fdkernels.pack_mlp(FLOW.net, ("cond", "x")), ValueError, "order must name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_empty_batches(lead: tuple[int, ...]) -> None:
    displacement = torch.randn(*lead, 6, requires_grad=True)
    penalty = fdkernels.fisher_penalty(displacement, torch.randn(*lead, 3, 6))
    assert penalty.shape == lead
    penalty.sum().backward()
    assert displacement.grad is not None
    cond = torch.randn(*lead, 5)
    assert fdkernels.integrate_flow(FLOW, displacement.detach(), cond).shape == (*lead, 6)
    assert fdkernels.flow_fisher_penalty(FLOW, cond, displacement).shape == lead
