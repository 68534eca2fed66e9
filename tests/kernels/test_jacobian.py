"""The fused Jacobian of a flow against the plain maths in float64, which differentiates the solver row by row."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from fdkernels.activations import ACTIVATIONS
from fdkernels.kernels.activate import activate_with_derivative
from fdkernels.kernels.flow import launch
from fdkernels.kernels.tuning.plans import MOST_LANES, lanes
from fdkernels.layers import encode
from fdkernels.networks import PackedMLP
from fdkernels.ops.jacobian import Call, fused_jacobian
from fdkernels.ops.register import Layout
from fdkernels.philox import philox_normal
from fdkernels.records import Way
from fdkernels.solvers import METHODS, Solver
from fdkernels.velocity import bind
from tests.judge import BARS, assert_agree
from tests.kernels.device import BACKENDS, DEVICE, INTERPRETED, guarded, on_gpu, strided
from tests.kernels.test_flow import PRECISIONS, _Calls, draw, in_double, mlp_on, network, relative

TIMES = [0.0, 0.3, 1.0]
NEVER = (0.0, 0.0, "never")


def jacobian(
    velocity: Any, x0: Tensor, cond: Tensor | None, solver: Solver | None = None, precision: str = "highest"
) -> tuple[Tensor, Tensor]:
    bound = bind("flow_jacobian", velocity, x0, precision, (x0.shape[-1],))
    solver = solver or Solver(TIMES, "euler", *NEVER)
    return fused_jacobian(bound.encoded(), x0, cond, solver, bound.way("streamed"))


def truth(velocity: Any, x0: Tensor, cond: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The plain maths in float64."""
    x0 = x0.double().cpu()
    spread = None if cond is None else cond.double().cpu().expand(*x0.shape[:-1], cond.shape[-1])
    return fdkernels_ref.flow_jacobian(in_double(velocity), x0, spread, **{"time_grid": TIMES, "clip": None} | options)


def judge(mlp: PackedMLP, x0: Tensor, cond: Tensor | None, method: str = "euler", precision: str = "highest") -> None:
    given = None if cond is None else guarded(cond)
    end, columns = jacobian(mlp, guarded(x0), given, Solver(TIMES, method, *NEVER), precision)
    true_end, true_columns = truth(mlp, x0, cond, method=method)
    assert columns.dtype == torch.float32
    assert relative(end, true_end) < PRECISIONS[precision]
    assert relative(columns, true_columns) < PRECISIONS[precision]
    # beyond the identity, from which they start: columns that are mixed up, or rows for columns, would show
    moved = true_columns - torch.eye(x0.shape[-1], dtype=torch.float64)
    assert relative(columns.cpu() - torch.eye(x0.shape[-1]), moved) < 10 * PRECISIONS[precision]
    if x0.shape[-1] > 1:
        assert relative(columns.mT, true_columns) > 100 * PRECISIONS[precision]
        assert relative(columns.roll(1, -1), true_columns) > 100 * PRECISIONS[precision]


@pytest.mark.parametrize(
    ("lead", "cond_dim", "d", "hidden"),
    [
        ((5,), 17, 6, (64, 64, 64)),
        ((1,), 0, 1, (33,)),
        ((2, 5), 40, 3, (30, 70, 20)),
        ((3,), 4, 17, (48, 33)),
        ((3,), 0, 31, (40, 20)),
        ((2,), 3, 70, (20, 50)),
        ((1,), 0, 128, (16,)),
        *([] if INTERPRETED else [((256,), 17, 6, (512,) * 4), ((70,), 300, 21, (1024,) * 3)]),
    ],
    ids=str,
)
def test_sizes(lead: tuple[int, ...], cond_dim: int, d: int, hidden: tuple[int, ...]) -> None:
    judge(network(cond_dim, d, hidden), draw(*lead, d), draw(*lead, cond_dim) if cond_dim else None)


@on_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_at_the_published_size(precision: str) -> None:
    judge(network(17, 6, (512,) * 4), draw(256, 6), draw(256, 17), precision=precision)


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
def test_activations_and_layer_norms(activation: str, norm: str) -> None:
    judge(network(3, 5, (24, 17), activation, norm, order=("x", "t", "cond")), draw(3, 5), draw(3, 3))


def test_wide_layer_norm() -> None:
    """Fewer rows at once than belong together, and more columns than a tile of many rows has."""
    judge(network(0, 9, (520, 16), norm="before"), draw(2, 9), None)
    judge(network(0, 3, (2050,), norm="after"), draw(1, 3), None)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    judge(network(5, 3, (32, 32)), draw(7, 3), draw(7, 5), method)


@triton.jit
def activation_kernel(h_ptr, value_ptr, slope_ptr, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, SIZE)
    value, slope = activate_with_derivative(tl.load(h_ptr + i), ACTIVATION)
    tl.store(value_ptr + i, value)
    tl.store(slope_ptr + i, slope)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_any_number(activation: str) -> None:
    """Within a few roundings of 1 everywhere, without cancellation or overflow; NaN stays NaN."""
    h = torch.cat([torch.linspace(-12, 12, 1009), torch.logspace(-30, 37, 7), -torch.logspace(-30, 37, 7)])
    h = torch.cat([h, torch.tensor([torch.nan])])
    exact = h.double().requires_grad_()
    values = ACTIVATIONS[activation].module()(exact)
    (slopes,) = torch.autograd.grad(values.sum(), exact)
    value, slope = guarded(torch.zeros(1024)), guarded(torch.zeros(1024))
    activation_kernel[(1,)](guarded(h), value, slope, SIZE=1024, ACTIVATION=activation)
    assert value[-1].isnan()
    assert slope[-1].isnan()
    bar = 2e-6 if DEVICE.type == "cuda" else 5e-7  # a GPU's exponential is approximate
    assert ((slope[:-1].cpu() - slopes[:-1]).abs() < bar).all()
    assert ((value[:-1].cpu() - values[:-1]).abs() <= bar * h[:-1].abs().clamp(min=1)).all()


def test_only_the_end_is_clipped() -> None:
    mlp, x0, cond = network(5, 3, (32, 32)), guarded(draw(20, 3)), guarded(draw(20, 5))
    low, high = -0.2, 0.3
    free, columns = jacobian(mlp, x0, cond, Solver(TIMES, "heun", *NEVER))
    end, same = jacobian(mlp, x0, cond, Solver(TIMES, "heun", low, high, "end"))
    assert torch.equal(end, free.clamp(low, high))
    assert not torch.equal(end, free)
    assert torch.equal(same, columns)
    true_end, true_columns = truth(mlp, x0, cond, method="heun", clip=(low, high))
    assert relative(end, true_end) < PRECISIONS["highest"]
    assert relative(same, true_columns) < PRECISIONS["highest"]


def test_end_is_that_of_the_flow() -> None:
    mlp, x0, cond = network(5, 3, (32, 32)), guarded(draw(7, 3)), guarded(draw(7, 5))
    end, _ = jacobian(mlp, x0, cond, precision="high")
    flow = functools.partial(fdkernels.integrate_flow, mlp, x0, cond, time_grid=TIMES, clip=None, precision="high")
    assert_agree(end, flow(implementation="streamed"), truth(mlp, x0, cond)[0], PRECISIONS["high"])


@pytest.mark.parametrize("shape", [(3, 1, 5), (5,), (1, 4, 5)])
def test_conditions_that_rows_share(shape: tuple[int, ...]) -> None:
    judge(network(5, 6, (32,)), draw(3, 4, 6), draw(*shape))


@pytest.mark.parametrize("d", [3, 17])
def test_blocks_of_rows_in_turns(d: int) -> None:
    """One program processes all blocks of rows; one state's share of columns may lie in two of them."""
    mlp, x0, cond = network(5, d, (32, 20), norm="before"), guarded(draw(13, d)), guarded(draw(13, 5))
    apart = jacobian(mlp, x0, cond)
    with mock.patch.object(launch, "multiprocessors", return_value=0):
        together = jacobian(mlp, x0, cond)
    assert all(map(torch.equal, together, apart))
    assert relative(together[1], truth(mlp, x0, cond)[1]) < PRECISIONS["highest"]


def test_rows_of_a_state() -> None:
    """All d tangents travel, in as few rows as possible."""
    for d in range(1, 129):
        in_chunk, chunks = lanes(d)
        assert in_chunk <= MOST_LANES
        assert in_chunk & (in_chunk - 1) == 0
        assert chunks * (in_chunk - 1) >= d > (chunks - 1) * (in_chunk - 1)
        assert in_chunk * chunks <= 2 * d
    assert lanes(6) == (8, 1)


@pytest.mark.parametrize("layout", ["transposed", "wide"])
def test_inputs_of_any_layout(layout: str) -> None:
    mlp, x0, cond = network(5, 6, (32, 32)), draw(4, 3, 6), draw(4, 3, 5)
    plain = jacobian(mlp, guarded(x0), guarded(cond))
    assert all(map(torch.equal, jacobian(mlp, strided(x0, layout), strided(cond, layout)), plain))


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Products in the weights' dtype have at most twice the error of the plain maths in that dtype."""
    mlp, x0, cond = mlp_on(network(17, 6, (64, 64)), DEVICE, dtype), draw(9, 6, dtype=dtype), draw(9, 17, dtype=dtype)
    bound = bind("flow_jacobian", mlp, guarded(x0), None, (x0.shape[-1],))
    solver, way = Solver(TIMES, "euler", *NEVER), bound.way("streamed")
    out = fused_jacobian(bound.encoded(), guarded(x0), guarded(cond), solver, way)
    assert (out[0].dtype, out[1].dtype) == (dtype, torch.float32)
    plain = fdkernels_ref.flow_jacobian(mlp_on(mlp, torch.device("cpu"), dtype), x0, cond, time_grid=TIMES, clip=None)
    for part, simple, exact in zip(out, plain, truth(mlp, x0, cond)):
        assert relative(part, exact) < min(2 * relative(simple, exact), BARS[dtype]["triton"])


def test_empty_batch_and_bad_rows() -> None:
    mlp = network(5, 3, (32, 32))
    end, columns = jacobian(mlp, torch.empty(2, 0, 3, device=DEVICE), torch.empty(2, 0, 5, device=DEVICE))
    assert (end.shape, columns.shape) == ((2, 0, 3), (2, 0, 3, 3))
    x0, cond = draw(11, 3), draw(11, 5)
    clean = jacobian(mlp, guarded(x0), guarded(cond))
    x0[4, 1] = torch.nan
    good = [row for row in range(11) if row != 4]
    for out, right in zip(jacobian(mlp, guarded(x0), guarded(cond)), clean):
        assert torch.equal(out[good], right[good])
        assert out[4].isnan().all()


def test_many_networks_in_one_launch() -> None:
    """vmap over stacked parameters, with and without common rows, and over rows alone."""
    modules = [fdkernels.VelocityMLP(5, 3, (32, 24), layer_norm=True).to(DEVICE) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x0, cond, shared = guarded(draw(3, 9, 3)), guarded(draw(3, 9, 5)), guarded(draw(9, 5))

    def of(parameters: dict[str, Tensor], x0: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        calls = _Calls(modules[0], lambda module: jacobian(module, x0, cond))
        return torch.func.functional_call(calls, {f"module.{k}": v for k, v in parameters.items()}, ())

    with mock.patch.object(launch, "jacobian", side_effect=launch.jacobian) as launched:
        own = torch.vmap(of)(parameters, x0, cond)
        common = torch.vmap(of, in_dims=(0, 0, None))(parameters, x0, shared)
        rows = torch.vmap(of, in_dims=(None, 0, 0))({k: v[1] for k, v in parameters.items()}, x0, cond)
    assert launched.call_count == 3
    for i, module in enumerate(modules):
        for outs, velocity, condition in (
            (own, module, cond[i]),
            (common, module, shared),
            (rows, modules[1], cond[i]),
        ):
            exact = truth(velocity, x0[i], condition)
            assert_agree([out[i] for out in outs], jacobian(velocity, x0[i], condition), exact)


def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)  # NaN in fresh memory is not equal to itself
    packed = network(5, 3, (16, 16))
    encoded = encode([layer.read() for layer in packed.layers], packed.order)
    solver, x0 = Solver([0.0, 0.5, 1.0], "heun", -1.0, 1.0, "end"), draw(1, 8, 3).to(DEVICE)
    for cond in (draw(1, 8, 5), draw(1, 2, 5)):
        call = Call(x0, cond.to(DEVICE), encoded, solver, Way("highest", "streamed"))
        torch.library.opcheck(torch.ops.fdkernels.flow_jacobian.default, Layout(Call).flat(call))


def test_compiled_whole() -> None:
    torch.compiler.reset()
    module = fdkernels.VelocityMLP(5, 3, (16, 16)).to(DEVICE)
    x0, cond = draw(8, 3).to(DEVICE), draw(8, 5).to(DEVICE)

    def size(x0: Tensor, cond: Tensor) -> Tensor:
        end, columns = jacobian(module, x0, cond)
        return (columns @ end.unsqueeze(-1)).squeeze(-1)

    compiled = torch.compile(size, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x0, cond), size(x0, cond))
    torch.compiler.reset()


def test_clipped_steps_are_refused() -> None:
    with pytest.raises(AssertionError, match="clipped steps"):
        jacobian(network(0, 3, (16,)), guarded(draw(2, 3)), None, Solver(TIMES, "euler", -1.0, 1.0, "step"))


# -- the public functions --------------------------------------------------------------------------------------------


def everything(velocity: Any, cond: Tensor, action: Tensor, displacement: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """What both functions of a flow give."""
    end, columns = fdkernels.flow_jacobian(velocity, action, cond, num_steps=2, method="heun", **options)
    penalty, jacobians = fdkernels.flow_pullback_penalty(
        velocity, cond, action, displacement, num_samples=2, seed=3, return_jacobian=True, **options
    )
    return end, columns, penalty, jacobians


GRIDS = {"linear": [0.8, 0.9, 1.0], "linear_reversed": [0.2, 0.1, 0.0]}


def true_everything(velocity: Any, *given: Tensor, path: str = "linear") -> tuple[Tensor, ...]:
    """The plain maths in float64, from the same noise."""
    cond, action, displacement = (tensor.double().cpu() for tensor in given)
    velocity = in_double(velocity)
    end, columns = fdkernels_ref.flow_jacobian(velocity, action, cond, path=path, num_steps=2, method="heun")
    bridge = philox_normal(3, (*action.shape[:-1], 2, action.shape[-1]), "cpu", torch.float32).double()
    penalty = fdkernels_ref.flow_pullback_penalty(velocity, cond, action, displacement, path=path, bridge_noise=bridge)
    view = 0.2 * bridge + 0.8 * action.unsqueeze(-2)
    rows = cond.unsqueeze(-2).expand(*view.shape[:-1], cond.shape[-1])
    _, jacobians = fdkernels_ref.flow_jacobian(velocity, view, rows, time_grid=GRIDS[path])
    return end, columns, penalty, 0.2 * jacobians


@pytest.mark.parametrize(
    ("lead", "path"), [((7,), "linear"), ((), "linear"), ((2, 3), "linear"), ((5,), "linear_reversed")], ids=str
)
def test_public_functions_are_one_on_both_backends(lead: tuple[int, ...], path: str) -> None:
    module = fdkernels.VelocityMLP(5, 3, (32, 24), layer_norm=True).to(DEVICE)
    given = guarded(draw(*lead, 5)), guarded(draw(*lead, 3, seed=1)), guarded(draw(*lead, 3, seed=2))
    exact = true_everything(module, *given, path=path)
    with mock.patch.object(launch, "jacobian", side_effect=launch.jacobian) as launched:
        ours = everything(module, *given, path=path, backend="triton", precision="highest")
        assert launched.call_count == 2
        theirs = everything(module, *given, path=path, backend="torch")
        assert launched.call_count == 2
    assert [out.dtype for out in ours] == [out.dtype for out in theirs]
    for one, other, truth in zip(ours, theirs, exact):
        assert relative(one, truth) < PRECISIONS["highest"]
        assert relative(other, truth) < PRECISIONS["highest"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_public_penalty(backend: str) -> None:
    """It reaches the displacement alone."""
    module = fdkernels.VelocityMLP(5, 3, (32, 24)).to(DEVICE)
    cond, action, displacement = (guarded(draw(7, n, seed=n)).requires_grad_() for n in (5, 3, 3))
    call = functools.partial(fdkernels.flow_pullback_penalty, seed=3, reduction="sum", backend=backend)
    call(module, cond, action, displacement).backward()
    assert all(tensor.grad is None for tensor in (cond, action, *module.parameters()))
    assert (displacement.grad * displacement).sum().item() == pytest.approx(
        2 * call(module, cond, action, displacement).item(), rel=1e-5
    )


def test_public_functions_of_many_networks() -> None:
    """vmap over stacked parameters makes two launches for all of them."""
    modules = [fdkernels.VelocityMLP(5, 3, (32, 24)).to(DEVICE) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    given = [guarded(draw(3, 4, n, seed=i)) for i, n in enumerate((5, 3, 3))]

    def of(parameters: dict[str, Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        calls = _Calls(modules[0], lambda module: everything(module, *given, backend="triton", precision="highest"))
        return torch.func.functional_call(calls, {f"module.{k}": v for k, v in parameters.items()}, ())

    with mock.patch.object(launch, "jacobian", side_effect=launch.jacobian) as launched:
        together = torch.vmap(of)(parameters, *given)
    assert launched.call_count == 2
    for i, module in enumerate(modules):
        for out, exact in zip(together, true_everything(module, *(tensor[i] for tensor in given))):
            assert relative(out[i], exact) < PRECISIONS["highest"]


def test_public_functions_in_half_precision() -> None:
    """J is in float32, and the products are those of the weights' dtype."""
    module = fdkernels.VelocityMLP(5, 3, (32, 24)).to(DEVICE, torch.float16)
    given = [guarded(draw(7, n, seed=i, dtype=torch.float16)) for i, n in enumerate((5, 3, 3))]
    bridge = guarded(draw(7, 2, 3, dtype=torch.float16))
    wide = [tensor.double().cpu() for tensor in (*given, bridge)]
    exact = fdkernels_ref.flow_pullback_penalty(in_double(module), *wide[:3], bridge_noise=wide[3])
    for backend in BACKENDS:
        penalty = fdkernels.flow_pullback_penalty(module, *given, bridge_noise=bridge, backend=backend)
        assert penalty.dtype == torch.float32
        assert relative(penalty, exact) < 4 * BARS[torch.float16][backend]  # δᵀMδ squares J's error


TWO_NORMS = nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3))
REFUSED = {
    "a callable": (lambda x, t, c: x, torch.float32, "serves a VelocityMLP or a packed MLP"),
    "float64": (fdkernels.VelocityMLP(5, 3, (8,)).double(), torch.float64, "serves float32, .* got torch.float64"),
    "linear": (nn.Linear(9, 3), torch.float32, "serves networks with a hidden layer"),
    "two norms": (TWO_NORMS, torch.float32, "serves one layer norm in a layer"),
    "wide": (fdkernels.VelocityMLP(5, 129, (8,)), torch.float32, "serves up to 128 dimensions, got 129"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_does_not_serve(case: str) -> None:
    """Asked for, it is refused; left open, PyTorch serves it."""
    velocity, dtype, message = REFUSED[case]
    if isinstance(velocity, nn.Module):
        velocity = velocity.to(DEVICE)
        velocity = velocity if isinstance(velocity, fdkernels.VelocityMLP) else fdkernels.pack_mlp(velocity)
    d = 129 if case == "wide" else 3
    given = [draw(2, n, dtype=dtype).to(DEVICE) for n in (5, d, d)]
    with pytest.raises(RuntimeError, match=f"flow_jacobian: backend='triton' {message}.*; leave the choice open"):
        fdkernels.flow_jacobian(velocity, given[1], given[0], backend="triton")
    with pytest.raises(RuntimeError, match=f"flow_pullback_penalty: backend='triton' {message}.*; leave the choice op"):
        fdkernels.flow_pullback_penalty(velocity, *given, backend="triton")
    if case != "wide":
        assert all(out.isfinite().all() for out in everything(velocity, *given))


def test_no_implementation_but_the_one() -> None:
    """Only one implementation carries tangents, so that there is no argument to choose one."""
    module, given = fdkernels.VelocityMLP(5, 3, (8,)).to(DEVICE), [guarded(draw(2, n)) for n in (5, 3, 3)]
    with pytest.raises(TypeError, match="implementation"):
        fdkernels.flow_jacobian(module, given[1], given[0], implementation="gemm")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="flow_jacobian: backend must be one of"):
        fdkernels.flow_jacobian(module, given[1], given[0], backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flow_pullback_penalty: precision must be one of"):
        fdkernels.flow_pullback_penalty(module, *given, backend="triton", precision="tf32")  # type: ignore[arg-type]
