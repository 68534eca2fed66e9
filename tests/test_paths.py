"""Flows on other paths than the linear one: the reference's values, closed forms, and which way time runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkernels
import fdkernels_ref
from fdkernels.paths import PATHS, data_time
from tests.closed_forms import SCHEDULES, anisotropic_gaussian

F64 = torch.float64
OTHERS = ("linear_reversed", "vp", "cosine")
SQUARE = fdkernels.AffinePath(  # data at t = 0
    lambda t: (1 - t) ** 2, lambda t: t, lambda t: 2 * (t - 1), lambda t: torch.ones_like(t)
)
LIKE_LINEAR = fdkernels.AffinePath(lambda t: t, lambda t: 1 - t, torch.ones_like, lambda t: -torch.ones_like(t))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def flow_of(cond_dim: int = 4, d: int = 3) -> fdkernels.VelocityMLP:
    torch.manual_seed(0)
    return fdkernels.VelocityMLP(cond_dim, d, hidden=(16, 8)).double()


def called(flow: fdkernels.VelocityMLP) -> Callable[..., Tensor]:
    """The same velocity as a function that nothing is known of."""
    return lambda x, t, cond: flow(x, t, cond)


@pytest.mark.parametrize("time", ["default", "number", "tensor"])
@pytest.mark.parametrize("path", [*OTHERS, SQUARE], ids=["reversed", "vp", "cosine", "square"])
def test_penalties_on_a_path(path: Any, time: str) -> None:
    flow, cond, displacement, action = flow_of(), draw(5, 4), draw(5, 3), draw(5, 3, seed=1)
    noise, bridge = draw(5, 4, 3, seed=2), draw(5, 4, 3, seed=3)
    t = {"default": None, "number": 0.4, "tensor": draw(5, 4, 1).sigmoid()}[time]
    options = {"noise": noise, "bridge_noise": bridge, "num_samples": 4, "path": path, "t": t, "num_steps": 3}
    of_view = {"bridge_noise": bridge, "path": path, "t": None if time == "tensor" else t, "num_steps": 3}
    for velocity in (flow, called(flow)):
        ours, theirs = displacement.clone().requires_grad_(), displacement.clone().requires_grad_()
        found = fdkernels.flow_fisher_penalty(velocity, cond, ours, return_score=True, **options)
        wanted = fdkernels_ref.flow_fisher_penalty(flow, cond, theirs, return_score=True, **options)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(fdkernels.flow_fisher_penalty(velocity, cond, ours, **options), wanted[0])
        pulled = fdkernels.flow_pullback_penalty(velocity, cond, action, ours, **of_view)
        wanted_pulled = fdkernels_ref.flow_pullback_penalty(flow, cond, action, theirs, **of_view)
        torch.testing.assert_close(pulled, wanted_pulled)
        gradients = [torch.autograd.grad(out.sum(), leaf) for out, leaf in
                     ((found[0], ours), (wanted[0], theirs), (pulled, ours), (wanted_pulled, theirs))]  # fmt: skip
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[2], gradients[3])


@pytest.mark.parametrize("path", [*OTHERS, SQUARE], ids=["reversed", "vp", "cosine", "square"])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_default_grid_runs_from_noise_to_data(path: Any, method: str) -> None:
    flow, x0, cond = flow_of(), draw(5, 3), draw(5, 4)
    options = {"path": path, "num_steps": 4, "method": method}
    backwards = path in ("linear_reversed", SQUARE)
    grid = {"num_steps": 7, "time_grid": [1.0, 0.75, 0.5, 0.25, 0.0] if backwards else [0.0, 0.25, 0.5, 0.75, 1.0]}
    for velocity in (flow, called(flow)):
        end = fdkernels.integrate_flow(velocity, x0, cond, **options)
        torch.testing.assert_close(end, fdkernels_ref.integrate_flow(flow, x0, cond, **options))
        assert torch.equal(end, fdkernels.integrate_flow(velocity, x0, cond, **options | grid))
        assert torch.equal(end, fdkernels.integrate_flow(velocity, x0, cond, method=method, **grid))
        (alone,) = fdkernels.integrate_flow_groups(velocity, [x0], [cond], **options)
        torch.testing.assert_close(alone, end)
        found = fdkernels.flow_jacobian(velocity, x0, cond, **options)
        torch.testing.assert_close(found, fdkernels_ref.flow_jacobian(flow, x0, cond, **options))


def test_reversed_time_is_the_linear_path_seen_backwards() -> None:
    """With u(x, t) = −v(x, 1 − t), as robot policies have it, everything is as on the linear path."""
    flow, cond, displacement, x0 = flow_of(), draw(5, 4), draw(5, 3), draw(5, 3, seed=1)

    def backwards(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return -flow(x, 1 - t, cond)

    calls: list[Callable[..., Any]] = [
        lambda v, **path: fdkernels.integrate_flow(v, x0, cond, method="rk4", **path),
        lambda v, **path: fdkernels.integrate_flow_groups(v, [x0], [cond], clip_each_step=True, **path),
        lambda v, **path: fdkernels.flow_jacobian(v, x0, cond, **path),
        lambda v, **path: fdkernels.flow_fisher_penalty(v, cond, displacement, seed=1, return_score=True, **path),
        lambda v, **path: fdkernels.flow_pullback_penalty(v, cond, x0, displacement, seed=1, **path),
    ]
    for call in calls:
        torch.testing.assert_close(call(backwards, path="linear_reversed"), call(flow))


@pytest.mark.parametrize("path", OTHERS)
def test_scores_of_a_gaussian(path: str) -> None:
    """Samples carried by the exact flow, and their scores, are known."""
    gaussian, schedule = anisotropic_gaussian(3, path=path), SCHEDULES[path]
    noise, bridge, displacement, cond = draw(4, 6, 3), draw(4, 6, 3, seed=1), draw(4, 3), draw(4, 1)
    begin, end = 1 - schedule.data_time, schedule.data_time
    options = {}
    if path == "vp":  # whose σ̇ is infinite at the end
        end = 0.99
        options["time_grid"] = (torch.linspace(0, 1, 41, dtype=F64) * end).tolist()
    penalty, score = fdkernels.flow_fisher_penalty(
        gaussian.velocity, cond, displacement, path=path, noise=noise, bridge_noise=bridge, num_steps=40, method="rk4",
        clip=None, return_score=True, **options,
    )  # fmt: skip
    t = torch.tensor(abs(schedule.data_time - 0.05), dtype=F64)
    samples = gaussian.transport(noise, begin, end)
    expected = gaussian.score(schedule.sigma(t) * bridge + schedule.alpha(t) * samples, t)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(penalty, fdkernels_ref.fisher_penalty(displacement, expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", OTHERS)
def test_the_mean_penalty_of_a_gaussian(path: str) -> None:
    """E[(s·δ)²] = δᵀΣ_t⁻¹δ."""
    gaussian, k = anisotropic_gaussian(3, path=path), 20_000
    generator = torch.Generator().manual_seed(0)
    samples = gaussian.sample(4 * k, generator).view(4, k, 3)
    t, displacement = 0.3 if path == "linear_reversed" else 0.7, draw(4, 3)
    penalty = fdkernels.flow_fisher_penalty(
        gaussian.velocity, torch.zeros(4, 1, dtype=F64), displacement, path=path, t=t, samples=samples,
        generator=generator, damping=0.0, normalize="none",
    )  # fmt: skip
    precision = torch.linalg.inv(gaussian.covariance_t(t))
    exact = torch.einsum("bi,ij,bj->b", displacement, precision, displacement) / 3
    z = (penalty / exact - 1).abs() / (2 / k) ** 0.5
    assert (z < 4.5).all(), f"{z} standard errors"


@pytest.mark.parametrize("path", OTHERS)
def test_the_pullback_of_a_gaussian(path: str) -> None:
    """Σ⁻¹ + (α_t/σ_t)²·I for any action and noise."""
    gaussian, schedule, displacement = anisotropic_gaussian(3, path=path), SCHEDULES[path], draw(4, 3)
    t = torch.tensor(abs(schedule.data_time - 0.3), dtype=F64)
    steps, method, rtol = (500, "euler", 5e-3) if path == "vp" else (100, "rk4", 1e-6)  # σ̇ is infinite at vp's end
    penalty = fdkernels.flow_pullback_penalty(
        gaussian.velocity, draw(4, 1), draw(4, 3), displacement, path=path, num_samples=1, seed=1,
        t=t.item(), num_steps=steps, method=method, damping=0.0, normalize="none",
    )  # fmt: skip
    metric = torch.linalg.inv(gaussian.covariance)
    metric = metric + (schedule.alpha(t) / schedule.sigma(t)) ** 2 * torch.eye(3, dtype=F64)
    expected = torch.einsum("bi,ij,bj->b", displacement, metric, displacement) / 3
    torch.testing.assert_close(penalty, expected, rtol=rtol, atol=0)


def test_defaults_are_near_the_data() -> None:
    flow, cond, displacement, action = flow_of(), draw(5, 4), draw(5, 3), draw(5, 3, seed=1)
    for path, near, view in (("linear", 0.95, 0.8), ("cosine", 0.95, 0.8), (LIKE_LINEAR, 0.95, 0.8),
                             ("linear_reversed", 0.05, 0.2), (SQUARE, 0.05, 0.2)):  # fmt: skip
        whole = [fdkernels.flow_fisher_penalty(flow, cond, displacement, path=path, t=t, seed=1) for t in (None, near)]
        pulled = [
            fdkernels.flow_pullback_penalty(flow, cond, action, displacement, path=path, t=t, seed=1)
            for t in (None, view)
        ]
        assert torch.equal(*whole)
        assert torch.equal(*pulled)


def test_a_grid_beyond_the_steps_with_a_clip_at_each() -> None:
    """ReinFlow's sampler evaluates at linspace(0, 1, S), with steps of 1/S: t = 1 is one of its times."""
    flow, x0, cond, steps = flow_of(), 2 * draw(5, 3), draw(5, 4), 4
    x = x0
    for t in torch.linspace(0, 1, steps, dtype=F64):
        x = (x + flow(x, t.expand(5, 1), cond) / steps).clamp(-1, 1)
    stretched = lambda x, t, cond: flow(x, t * steps / (steps - 1), cond)  # noqa: E731
    ours = fdkernels.integrate_flow(stretched, x0, cond, num_steps=steps, clip_each_step=True)
    torch.testing.assert_close(ours, x)
    past = {"time_grid": [0.0, 0.5, 1.0, 1.2], "clip_each_step": True}
    torch.testing.assert_close(
        fdkernels.integrate_flow(flow, x0, cond, **past), fdkernels_ref.integrate_flow(flow, x0, cond, **past)
    )


@pytest.mark.parametrize(
    ("path", "dynamic"),
    [
        ("linear_reversed", False),
        pytest.param(SQUARE, False, marks=pytest.mark.long("compiles another path")),
        pytest.param("vp", True, marks=pytest.mark.long("compiles another path")),
    ],
    ids=["reversed", "own", "vp"],
)
def test_compiles_without_a_graph_break(path: Any, dynamic: bool) -> None:
    flow, cond, displacement, noise = flow_of(), draw(5, 4), draw(5, 3), draw(5, 2, 3)

    def run(displacement: Tensor) -> Tensor:
        actions = fdkernels.integrate_flow(flow, noise, cond.unsqueeze(1), path=path, num_steps=2)
        options = {"path": path, "bridge_noise": noise.flip(0)}
        penalty = fdkernels.flow_fisher_penalty(flow, cond, displacement, samples=actions, **options)
        view = {"num_steps": 1, "damping": 0.1}
        return penalty + fdkernels.flow_pullback_penalty(flow, cond, actions[:, 0], displacement, **options, **view)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    gradients = []
    for call in (compiled, run):
        leaf = displacement.clone().requires_grad_()
        gradients += torch.autograd.grad(call(leaf).sum(), leaf)
    torch.testing.assert_close(compiled(displacement), run(displacement))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", PATHS)
def test_the_end_of_a_built_in_path_is_where_it_would_be_found(name: str) -> None:
    """The same functions as somebody's own path are asked for it."""
    path = PATHS[name]
    own = fdkernels.AffinePath(path.alpha, path.sigma, path.d_alpha, path.d_sigma)
    assert data_time("test", path) == data_time("test", own) == (0 if name == "linear_reversed" else 1)


@pytest.mark.parametrize("path", [*OTHERS, SQUARE], ids=["reversed", "vp", "cosine", "square"])
def test_a_time_that_changes_compiles(path: Any) -> None:
    displacement, velocity, x = draw(5, 3), draw(5, 2, 3), draw(5, 2, 3, seed=1)

    def penalty(t: float) -> Tensor:
        return fdkernels.velocity_fisher_penalty(displacement, velocity, x, t, path=path)

    torch.compiler.reset()
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    for t in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(t), penalty(t))


class Power:
    """A schedule with attributes: α_t = t^power, or with the data at t = 0 (1 − t)^power."""

    def __init__(self) -> None:
        self.power, self.backwards = 2, False
        self.path = fdkernels.AffinePath(self.alpha, self.sigma, self.d_alpha, self.d_sigma)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t if self.backwards else t) ** self.power

    def sigma(self, t: Tensor) -> Tensor:
        return t if self.backwards else 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        grown = self.power * (1 - t if self.backwards else t) ** (self.power - 1)
        return -grown if self.backwards else grown

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.backwards else -torch.ones_like(t)


def test_a_path_that_changes_compiles_anew() -> None:
    """Its levels, and which way its time runs."""
    schedule, cond, displacement, noise = Power(), draw(5, 3), draw(5, 3), draw(5, 2, 3)
    given = {"path": schedule.path, "t": 0.5, "bridge_noise": noise, "num_steps": 1}

    def penalty(displacement: Tensor) -> Tensor:
        return fdkernels.flow_fisher_penalty(lambda x, t, c: c - t * x, cond, displacement, noise=noise, **given)

    torch.compiler.reset()
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    for schedule.power, schedule.backwards in ((2, False), (3, False), (3, True)):
        torch.testing.assert_close(compiled(displacement), penalty(displacement))


def test_vmap_over_displacements() -> None:
    flow, cond, displacement = flow_of(), draw(5, 4), draw(3, 5, 3)
    options = {"path": "vp", "noise": draw(5, 2, 3), "bridge_noise": draw(5, 2, 3, seed=1)}

    def penalty(displacement: Tensor) -> Tensor:
        return fdkernels.flow_fisher_penalty(flow, cond, displacement, **options)

    together = torch.func.vmap(torch.func.grad(lambda δ: penalty(δ).sum()))(displacement)
    for found, δ in zip(together, displacement):
        leaf = δ.clone().requires_grad_()
        torch.testing.assert_close(found, *torch.autograd.grad(penalty(leaf).sum(), leaf))


FLOW, C, D = flow_of(), draw(5, 4), draw(5, 3)
NOWHERE = fdkernels.AffinePath(torch.ones_like, torch.ones_like, torch.zeros_like, torch.zeros_like)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (lambda: fdkernels.integrate_flow(FLOW, D, C, path="ot"), "integrate_flow: path must be an AffinePath"),
    "unknown, groups": (
        lambda: fdkernels.integrate_flow_groups(FLOW, [D], [C], path=1), "integrate_flow_groups: path must be",
    ),
    "unknown, jacobian": (lambda: fdkernels.flow_jacobian(FLOW, D, C, path=None), "flow_jacobian: path must be"),
    "unknown, chain": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, C, D, path="ot"), "flow_fisher_penalty: path must be",
    ),
    "no direction": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, C, D, path=NOWHERE),
        "flow_fisher_penalty: path must run between noise and data for t and time_grid to have defaults",
    ),
    "no direction, pullback": (
        lambda: fdkernels.flow_pullback_penalty(FLOW, C, D, D, path=NOWHERE), "flow_pullback_penalty: path must run",
    ),
    "published convention": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, C, D, path="vp", convention="velocity"),
        "convention='velocity' is .* path='linear' only",
    ),
    "no noise": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, C, D, path="linear_reversed", t=0.0), "t must leave some noise",
    ),
    "data's end": (
        lambda: fdkernels.flow_pullback_penalty(FLOW, C, D, D, path="linear_reversed", t=0.0),
        r"t must be a number in \(0, 1\], got 0.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_of_noise_is_a_velocity() -> None:
    """As the page has it, with the noise that a Gaussian's score is."""
    gaussian, vp, noise = anisotropic_gaussian(3, path="vp"), fdkernels.paths.PATHS["vp"], draw(4, 6, 3)
    t = torch.tensor(0.8, dtype=F64)
    ε = -vp.sigma(t) * gaussian.score(noise, t)
    velocity = vp.d_alpha(t) * (noise - vp.sigma(t) * ε) / vp.alpha(t) + vp.d_sigma(t) * ε
    torch.testing.assert_close(velocity, gaussian.velocity(noise, t))
    torch.testing.assert_close(fdkernels.velocity_to_score(velocity, noise, 0.8, path="vp"), gaussian.score(noise, t))


def test_the_signs_of_the_page() -> None:
    """v-prediction on the cosine path is −2/π times the velocity."""
    t, a, x0 = draw(5, 1).sigmoid(), draw(5, 3), draw(5, 3, seed=1)
    cosine = fdkernels.paths.PATHS["cosine"]
    prediction = cosine.alpha(t) * x0 - cosine.sigma(t) * a
    torch.testing.assert_close(-torch.pi / 2 * prediction, cosine.d_alpha(t) * a + cosine.d_sigma(t) * x0)


def test_a_path_without_a_direction_serves_given_samples() -> None:
    """Nothing is integrated, so no grid needs one. The levels may be learned."""
    width = torch.nn.Parameter(torch.ones((), dtype=F64))
    hill = fdkernels.AffinePath(
        lambda t: 1 + t * (1 - t), lambda t: width * torch.ones_like(t), lambda t: 1 - 2 * t, torch.zeros_like
    )
    samples, bridge = draw(5, 2, 3), draw(5, 2, 3, seed=1)
    given = {"bridge_noise": bridge, "t": 0.3, "path": hill}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty = fdkernels.flow_fisher_penalty(FLOW, C, D, samples=samples, **given)
    x = bridge + 1.21 * samples
    v = FLOW(x, torch.full((5, 2, 1), 0.3, dtype=F64), C.unsqueeze(1).expand(5, 2, 4))
    torch.testing.assert_close(penalty, fdkernels_ref.fisher_penalty(D, (1.21 * v - 0.4 * x) / 0.4))
    with pytest.raises(ValueError, match="path must run between noise and data"):
        fdkernels.flow_fisher_penalty(FLOW, C, D, noise=samples, **given)


def test_a_path_without_a_direction_serves_with_times_given() -> None:
    options = {"path": NOWHERE, "time_grid": [0.0, 0.5, 1.0]}
    assert torch.equal(
        fdkernels.integrate_flow(FLOW, D, C, **options), fdkernels.integrate_flow(FLOW, D, C, num_steps=2)
    )
