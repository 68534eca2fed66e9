"""Action chunks: every number is that of the flattened action, and a network over sequences needs no reshaping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fdkernels

F64 = torch.float64
B, K, H, W, C = 5, 3, 4, 2, 6  # states, samples, horizon, width of an action, width of a condition


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


def mlp() -> fdkernels.VelocityMLP:
    torch.manual_seed(0)
    return fdkernels.VelocityMLP(C, H * W, hidden=(16, 8)).double()


class Transformer(nn.Module):
    """v(x, t, cond) over chunks (N, horizon, width), as in a robot policy: it attends to tokens behind a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.action, self.time, self.token = nn.Linear(W, 8), nn.Linear(1, 8), nn.Linear(C, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, W)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        h = self.action(x) + self.time(t)
        tokens = torch.cat([self.token(cond["tokens"]), h], 1)
        seen = torch.cat([cond["mask"], torch.ones_like(x[..., 0], dtype=torch.bool)], 1)
        attended, _ = self.attention(h, tokens, tokens, key_padding_mask=~seen, need_weights=False)
        return self.out(torch.tanh(h + attended))


def context(*lead: int) -> dict[str, Tensor]:
    mask = torch.ones(*lead, 7, dtype=torch.bool)
    mask[..., 5:] = False
    return {"tokens": draw(*lead, 7, C), "mask": mask}


def flattened(transformer: Transformer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The transformer as a velocity of flat actions and a flat condition, as one would write it by hand."""

    def velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        tokens = cond.reshape(-1, 7, C)
        mask = (torch.arange(7) < 5).expand(len(tokens), 7)
        v = transformer(x.reshape(-1, H, W), t.reshape(-1, 1, 1), {"tokens": tokens, "mask": mask})
        return v.reshape(x.shape)

    return velocity


class Pair(NamedTuple):
    """A velocity of chunks with its condition, and the same by hand for flat actions."""

    chunks: Any
    cond: Any
    flat: Any
    flat_cond: Tensor


def pair(kind: str) -> Pair:
    if kind == "transformer":
        transformer, cond = Transformer().double(), context(B)
        return Pair(transformer, cond, flattened(transformer), cond["tokens"].flatten(1))
    flow, cond = mlp(), draw(B, C)
    if kind == "function":
        return Pair(lambda x, t, c: flow(x.flatten(1), t.flatten(1), c).view(x.shape), cond, flow, cond)
    return Pair(fdkernels.pack_mlp(flow) if kind == "packed" else flow, cond, flow, cond)


KINDS = pytest.mark.parametrize("kind", ["module", "packed", "function", "transformer"])
CHUNKS = draw(B, H, W)
NOISES = draw(B, K, H, W)


def same(found: Any, expected: Any, exact: bool) -> None:
    if exact:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


@KINDS
@pytest.mark.parametrize("path", ["linear", "linear_reversed"])
def test_flows_and_penalties_are_those_of_the_flattened_action(kind: str, path: str) -> None:
    """Exactly, where the same products are made; a function of chunks may join rows that otherwise go apart."""
    velocity, cond, by_hand, flat_cond = pair(kind)
    exact = kind in ("module", "packed")
    chunk, flat = {"path": path, "event_dim": 2}, {"path": path}
    found = fdkernels.integrate_flow(velocity, CHUNKS, cond, return_path=True, **chunk)
    expected = fdkernels.integrate_flow(by_hand, CHUNKS.flatten(1), flat_cond, return_path=True, **flat)
    same(found, expected.view(11, B, H, W), exact)
    ends = fdkernels.integrate_flow_groups(velocity, [CHUNKS, CHUNKS[:2]], [cond, first_two(cond)], **chunk)
    same(ends[0], expected[-1].view(B, H, W), False)
    same(ends[1], expected[-1][:2].view(2, H, W), False)
    end, jacobian = fdkernels.flow_jacobian(velocity, CHUNKS, cond, num_steps=2, **chunk)
    flat_end, flat_jacobian = fdkernels.flow_jacobian(by_hand, CHUNKS.flatten(1), flat_cond, num_steps=2, **flat)
    same(end, flat_end.view(B, H, W), exact)
    same(jacobian, flat_jacobian.view(B, H, W, H, W), exact)

    δ, flat_δ = CHUNKS.clone().requires_grad_(), CHUNKS.flatten(1).requires_grad_()
    given = {"noise": NOISES, "bridge_noise": NOISES.flip(0), "num_steps": 3}
    penalty, score = fdkernels.flow_fisher_penalty(velocity, cond, δ, return_score=True, **given, **chunk)
    given |= {name: given[name].flatten(2) for name in ("noise", "bridge_noise")}
    flat_penalty, flat_score = fdkernels.flow_fisher_penalty(
        by_hand, flat_cond, flat_δ, return_score=True, **given, **flat
    )
    same(penalty, flat_penalty, exact)
    same(score, flat_score.view(B, K, H, W), exact)
    action = draw(B, H, W, seed=1)
    pulled, jacobians = fdkernels.flow_pullback_penalty(
        velocity, cond, action, δ, bridge_noise=NOISES, return_jacobian=True, **chunk
    )
    flat_pulled, flat_jacobians = fdkernels.flow_pullback_penalty(
        by_hand, flat_cond, action.flatten(1), flat_δ, bridge_noise=NOISES.flatten(2), return_jacobian=True, **flat
    )
    same(pulled, flat_pulled, exact)
    same(jacobians, flat_jacobians.view(B, K, H, W, H, W), exact)
    for out, flat_out in ((penalty, flat_penalty), (pulled, flat_pulled)):
        (gradient,), (flat_gradient,) = torch.autograd.grad(out.sum(), δ), torch.autograd.grad(flat_out.sum(), flat_δ)
        same(gradient, flat_gradient.view(B, H, W), exact)


def first_two(cond: Any) -> Any:
    return {name: part[:2] for name, part in cond.items()} if isinstance(cond, dict) else cond[:2]


def test_penalties_of_scores_and_velocities() -> None:
    δ, flat_δ = CHUNKS.clone().requires_grad_(), CHUNKS.flatten(1).requires_grad_()
    score, x, jacobian = NOISES, draw(B, K, H, W, seed=1), draw(B, K, H, W, H, W)
    t = draw(B, K, 1, 1).sigmoid()
    pairs = [
        (fdkernels.fisher_penalty(δ, score, event_dim=2), fdkernels.fisher_penalty(flat_δ, score.flatten(2))),
        (
            fdkernels.velocity_fisher_penalty(δ, score, x, t, path="cosine", event_dim=2),
            fdkernels.velocity_fisher_penalty(flat_δ, score.flatten(2), x.flatten(2), t.flatten(2), path="cosine"),
        ),
        (
            fdkernels.pullback_penalty(δ, jacobian, event_dim=2),
            fdkernels.pullback_penalty(flat_δ, jacobian.view(B, K, H * W, H * W)),
        ),
    ]
    for found, expected in pairs:
        assert torch.equal(found, expected)
        (gradient,), (wanted,) = torch.autograd.grad(found.sum(), δ), torch.autograd.grad(expected.sum(), flat_δ)
        assert torch.equal(gradient, wanted.view(B, H, W))
    spectrum = fdkernels.fisher_spectrum(score, event_dim=2)
    assert torch.equal(spectrum, fdkernels.fisher_spectrum(score.flatten(2)))
    by_elements = fdkernels.velocity_to_score(score, x, t, path="cosine")  # needs no event_dim
    assert torch.equal(
        by_elements, fdkernels.velocity_to_score(score.flatten(2), x.flatten(2), t.flatten(2), path="cosine").view_as(x)
    )


def test_three_dimensions_and_no_leading_one() -> None:
    δ, score = draw(2, 3, 2), draw(K, 2, 3, 2)
    found = fdkernels.fisher_penalty(δ, score, event_dim=3)
    assert torch.equal(found, fdkernels.fisher_penalty(δ.flatten(), score.flatten(1)))
    flow = fdkernels.VelocityMLP(C, 12, hidden=(8,)).double()
    whole = fdkernels.flow_fisher_penalty(flow, draw(C), δ, seed=1, event_dim=3)
    assert torch.equal(whole, fdkernels.flow_fisher_penalty(flow, draw(C), δ.flatten(), seed=1))


def test_times_of_chunks() -> None:
    """One for each chunk of a state, (..., K, 1, 1), or fewer."""
    velocity, cond, *_ = pair("function")
    given = {"noise": NOISES, "bridge_noise": NOISES.flip(0), "event_dim": 2}

    def penalty(t: Any) -> Tensor:
        return fdkernels.flow_fisher_penalty(velocity, cond, CHUNKS, t=t, **given)

    half = penalty(0.5)
    for t in (
        torch.tensor(0.5, dtype=F64),
        torch.full((1, 1), 0.5, dtype=F64),
        torch.full((B, K, 1, 1), 0.5, dtype=F64),
    ):
        assert torch.equal(penalty(t), half)
    times = draw(B, K, 1, 1).sigmoid()
    _, _, by_hand, flat_cond = pair("function")
    flat = {"noise": NOISES.flatten(2), "bridge_noise": NOISES.flip(0).flatten(2), "t": times.flatten(2)}
    torch.testing.assert_close(
        penalty(times), fdkernels.flow_fisher_penalty(by_hand, flat_cond, CHUNKS.flatten(1), **flat)
    )
    with pytest.raises(ValueError, match=r"flow_fisher_penalty: t must broadcast to \(\.\.\., 1, 1\)"):
        penalty(torch.full((B, K, 1), 0.5, dtype=F64))


def test_what_a_callable_gets() -> None:
    """One leading dimension, times that broadcast against x, and the condition of its own state for each row."""
    seen: list[tuple[Tensor, Tensor, Any]] = []

    def velocity(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((x, t, cond))
        return -x + cond["step"][1].view(-1, 1, 1)

    number = torch.arange(B, dtype=F64)
    cond = {"step": (None, number), "tokens": [draw(B, 7, C)], "name": torch.arange(B).expand(3, B).T}
    fdkernels.flow_fisher_penalty(velocity, cond, CHUNKS, num_samples=K, num_steps=1, event_dim=2)
    for x, t, given in seen:
        assert (x.shape, t.shape) == ((B * K, H, W), (B * K, 1, 1))
        assert given["step"][0] is None
        assert torch.equal(given["step"][1], number.repeat_interleave(K))
        assert torch.equal(given["tokens"][0], cond["tokens"][0].repeat_interleave(K, 0))
        assert torch.equal(given["name"], cond["name"].repeat_interleave(K, 0))
    seen.clear()
    fdkernels.flow_pullback_penalty(velocity, cond, CHUNKS, CHUNKS, num_samples=K, num_steps=1, event_dim=2)
    ((x, t, given),) = seen
    assert (x.shape, t.shape) == ((H * W * B * K, H, W), (H * W * B * K, 1, 1))
    assert torch.equal(given["step"][1], number.repeat_interleave(K).repeat(H * W))
    seen.clear()
    fdkernels.integrate_flow(velocity, NOISES, {"step": (None, number[:, None])}, num_steps=1, event_dim=2)
    ((x, t, given),) = seen
    assert x.shape == (B * K, H, W)
    assert torch.equal(given["step"][1], number.repeat_interleave(K))


def test_conditions_of_more_dimensions_with_single_actions() -> None:
    """A callable keeps the leading shape then, and the condition gets it."""
    tokens, x0 = draw(B, 7, C), draw(B, K, W)

    def velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert cond.shape == (*x.shape[:-1], 7, C)
        return cond.mean((-2, -1))[..., None] - x

    ends = fdkernels.integrate_flow(velocity, x0, tokens.unsqueeze(1))
    for k in range(K):
        torch.testing.assert_close(ends[:, k], fdkernels.integrate_flow(velocity, x0[:, k], tokens))
    penalty = fdkernels.flow_fisher_penalty(velocity, tokens, x0[:, 0], seed=1)
    mean = tokens.mean((-2, -1), keepdim=True)[..., 0]
    plain = fdkernels.flow_fisher_penalty(lambda x, t, c: c - x, mean, x0[:, 0], seed=1)
    torch.testing.assert_close(penalty, plain)


def test_no_condition() -> None:
    unconditional = fdkernels.VelocityMLP(0, H * W, hidden=(8,)).double()
    given = {"seed": 1, "event_dim": 2}
    expected = fdkernels.flow_fisher_penalty(unconditional, draw(B, 0), CHUNKS, **given)
    assert torch.equal(fdkernels.flow_fisher_penalty(unconditional, None, CHUNKS, **given), expected)
    function = lambda x, t, c: unconditional(x.flatten(1), t.flatten(1)).view(x.shape)  # noqa: E731
    torch.testing.assert_close(fdkernels.flow_fisher_penalty(function, None, CHUNKS, **given), expected)
    fdkernels.flow_pullback_penalty(function, None, CHUNKS, CHUNKS, **given)


def test_seeded_noise_has_the_same_positions() -> None:
    velocity, cond, by_hand, flat_cond = pair("module")
    for draws in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}):
        found = fdkernels.flow_fisher_penalty(velocity, cond, CHUNKS, event_dim=2, **draws)
        if "generator" in draws:
            draws["generator"].manual_seed(3)
        assert torch.equal(found, fdkernels.flow_fisher_penalty(by_hand, flat_cond, CHUNKS.flatten(1), **draws))


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batches(lead: tuple[int, ...]) -> None:
    δ = draw(*lead, H, W)
    transformer = Transformer().double()
    for velocity, cond in ((mlp(), draw(*lead, C)), (lambda x, t, c: transformer.out(transformer.action(x)), None)):
        assert fdkernels.flow_fisher_penalty(velocity, cond, δ, event_dim=2).shape == lead
        assert fdkernels.flow_pullback_penalty(velocity, cond, δ, δ, event_dim=2).shape == lead
        assert fdkernels.integrate_flow(velocity, δ, cond, event_dim=2).shape == (*lead, H, W)


def test_gradients_through_the_solver_reach_a_structure() -> None:
    transformer, cond = Transformer().double(), context(B)
    tokens = cond["tokens"].requires_grad_()
    end = fdkernels.integrate_flow(transformer, CHUNKS, cond, num_steps=2, event_dim=2, differentiable=True, clip=None)
    found = torch.autograd.grad(end.sum(), [tokens, *transformer.parameters()])
    x = CHUNKS
    for t in (0.0, 0.5):
        x = x + transformer(x, torch.full((B, 1, 1), t, dtype=F64), cond) / 2
    torch.testing.assert_close(found, torch.autograd.grad(x.sum(), [tokens, *transformer.parameters()]))


@pytest.mark.parametrize("kind", ["transformer", pytest.param("module", marks=pytest.mark.long("compiles another"))])
def test_compiles_without_a_graph_break(kind: str) -> None:
    velocity, cond, *_ = pair(kind)

    def run(δ: Tensor) -> Tensor:
        samples = fdkernels.integrate_flow(velocity, NOISES, for_k(cond), num_steps=2, event_dim=2)
        return fdkernels.flow_fisher_penalty(
            velocity, cond, δ, samples=samples, bridge_noise=NOISES.flip(0), event_dim=2
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (compiled, run):
        leaf = CHUNKS.clone().requires_grad_()
        gradients += torch.autograd.grad(call(leaf).sum(), leaf)
    torch.testing.assert_close(*gradients)


def for_k(cond: Any) -> Any:
    return {name: part.unsqueeze(1) for name, part in cond.items()} if isinstance(cond, dict) else cond.unsqueeze(1)


def test_derivatives_of_a_callable_in_inference_mode() -> None:
    velocity, cond, *_ = pair("transformer")
    outs = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            start = CHUNKS.clone()
            given = {name: part.clone() for name, part in cond.items()}
            outs.append((
                *fdkernels.flow_jacobian(velocity, start, given, num_steps=2, event_dim=2),
                fdkernels.flow_pullback_penalty(velocity, given, start, start, seed=1, event_dim=2).detach(),
            ))  # fmt: skip
    torch.testing.assert_close(*outs)


def test_vmap_over_chunks() -> None:
    velocity, cond, *_ = pair("transformer")
    given = {"noise": NOISES, "bridge_noise": NOISES.flip(0), "num_steps": 2, "event_dim": 2}

    def penalty(δ: Tensor) -> Tensor:
        return fdkernels.flow_fisher_penalty(velocity, cond, δ, **given)

    many = draw(2, B, H, W)
    together = torch.func.vmap(torch.func.grad(lambda δ: penalty(δ).sum()))(many)
    for found, δ in zip(together, many):
        leaf = δ.clone().requires_grad_()
        torch.testing.assert_close(found, *torch.autograd.grad(penalty(leaf).sum(), leaf))


FLOW, COND = mlp(), draw(B, C)
FUNCTION = pair("function").chunks
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "zero": (lambda: fdkernels.fisher_penalty(CHUNKS, NOISES, event_dim=0), ValueError, "event_dim must be .* least 1"),
    "half": (lambda: fdkernels.fisher_spectrum(NOISES, event_dim=0.5), ValueError, "event_dim must be an integer"),
    "more than there are": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, COND, CHUNKS[0, 0], event_dim=2),
        ValueError, r"displacement must be \(\.\.\., \*event of event_dim=2 dimensions\).*got \(2,\)",
    ),
    "more than x0 has": (
        lambda: fdkernels.integrate_flow(FLOW, CHUNKS, COND, event_dim=4), ValueError, "x0 must be .*event_dim=4",
    ),
    "empty event": (
        lambda: fdkernels.fisher_penalty(CHUNKS[:, :0], NOISES[:, :, :0], event_dim=2), ValueError,
        r"displacement must be .* sizes of at least 1, got \(5, 0, 2\)",
    ),
    "another chunk": (
        lambda: fdkernels.fisher_penalty(CHUNKS, NOISES.mT, event_dim=2), ValueError,
        r"score must be .* event \(4, 2\) and its leading shape \(5,\), got \(5, 3, 2, 4\)",
    ),
    "another chunk, jacobian": (
        lambda: fdkernels.pullback_penalty(CHUNKS, draw(B, K, W, H, H, W), event_dim=2), ValueError,
        r"jacobian must be .* event \(4, 2\)",
    ),
    "another chunk, noise": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, COND, CHUNKS, noise=NOISES.mT, event_dim=2), ValueError,
        r"noise must be .* event \(4, 2\) and its leading shape \(5,\), got \(5, 3, 2, 4\)",
    ),
    "another chunk, action": (
        lambda: fdkernels.flow_pullback_penalty(FLOW, COND, CHUNKS.mT, CHUNKS, event_dim=2), ValueError,
        "action must be",
    ),
    "another chunk, velocity": (
        lambda: fdkernels.velocity_fisher_penalty(CHUNKS, NOISES, NOISES.mT, 0.5, event_dim=2), ValueError,
        "x must be velocity's shape",
    ),
    "another chunk, group": (
        lambda: fdkernels.integrate_flow_groups(FLOW, [CHUNKS, CHUNKS.mT], [COND, COND], event_dim=2), ValueError,
        r"all groups must have chunks of one shape, got x0s\[1\] of \(2, 4\) and \(4, 2\)",
    ),
    "another width": (
        lambda: fdkernels.integrate_flow(FLOW, CHUNKS[:, 1:], COND, event_dim=2), ValueError,
        "velocity moves 8 dimensions, got x0 with d=3·2=6",
    ),
    "structure for an MLP": (
        lambda: fdkernels.flow_fisher_penalty(FLOW, {"obs": COND}, CHUNKS, event_dim=2), ValueError,
        "velocity is an MLP, whose cond is a tensor",
    ),
    "tokens for an MLP": (
        lambda: fdkernels.integrate_flow(FLOW, CHUNKS, draw(B, 7, C), event_dim=2), ValueError,
        "velocity is an MLP, whose cond is a tensor",
    ),
    "other states": (
        lambda: fdkernels.flow_fisher_penalty(FUNCTION, {"a": [COND, COND[1:]]}, CHUNKS, event_dim=2), ValueError,
        r"cond\['a'\]\[1\] must",
    ),
    "one state for all": (
        lambda: fdkernels.flow_fisher_penalty(FUNCTION, {"a": COND[:1]}, CHUNKS, event_dim=2), ValueError,
        r"cond\['a'\] must begin with the displacement's leading shape \(5,\), got \(1, 6\)",
    ),
    "no tensor inside": (
        lambda: fdkernels.integrate_flow(FUNCTION, CHUNKS, {"a": "x"}, event_dim=2), TypeError,
        r"cond\['a'\] must be a tensor, None, or a dict, tuple or list",
    ),
    "wrong result": (
        lambda: fdkernels.integrate_flow(lambda x, t, c: x.flatten(1), CHUNKS, event_dim=2), ValueError,
        r"velocity must return x's shape \(5, 4, 2\), got \(5, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
