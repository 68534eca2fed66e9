"""The pull-back penalty and its gradient with respect to δ, beside the Fisher penalty of the same displacements.

    pytest benchmarks --benchmark-only -k pullback

"eager" is what one writes with torch.func: a Jacobian of the flow's last steps for each view, mapped over all views,
and d×d matrices. "ours, Fisher" is `flow_fisher_penalty` with K = 4, another answer to the same question; its check is
its own reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from benchmarks.harness import ON_GPU, TIMINGS, Entry, Outputs, Race, gate, normal, precision, rotating
from benchmarks.test_flow import Networks, flops, networks, traffic

T, STEPS, DAMPING, FISHER_SAMPLES = 0.8, 2, 3e-4, 4
TABLES = ("fp32", "tf32", "bf16") if ON_GPU else ("fp32",)
SIZES = ((256, 2, 17, 6), (256, 4, 29, 8))
Penalty = Callable[[Networks, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(velocity: Networks, obs: Tensor, action: Tensor, displacement: Tensor, noise: Tensor) -> Tensor:
    batch, num_samples, d = noise.shape

    def end(x: Tensor, obs: Tensor) -> Tensor:
        for i in range(STEPS):
            t = torch.full_like(x[:1], T + (1 - T) * i / STEPS)
            x = x + (1 - T) / STEPS * velocity.plain(torch.cat([obs, x, t]))
        return x

    with torch.no_grad():  # linalg.inv would wait for the GPU, and so could not be captured in a graph
        view = ((1 - T) * noise + T * action.unsqueeze(1)).reshape(-1, d)
        rows = obs.repeat_interleave(num_samples, dim=0)
        jacobian = (1 - T) * torch.func.vmap(torch.func.jacfwd(end))(view, rows).float()
        covariance = jacobian @ jacobian.mT + DAMPING * torch.eye(d, device=jacobian.device)
        metric = torch.linalg.inv_ex(covariance).inverse.view(batch, num_samples, d, d).mean(1)
        metric = metric / (metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-6))[:, None, None]
    return torch.einsum("bi,bij,bj->b", displacement, metric, displacement) / d


def ours(
    velocity: Networks, obs: Tensor, action: Tensor, displacement: Tensor, noise: Tensor, precision: Any = None
) -> Tensor:
    return fdkernels.flow_pullback_penalty(
        velocity.ours, obs, action, displacement, t=T, num_steps=STEPS, damping=DAMPING, bridge_noise=noise,
        precision=precision,
    )  # fmt: skip


def fisher(velocity: Networks, obs: Tensor, action: Tensor, displacement: Tensor, noise: Tensor) -> Tensor:
    start, bridge = _fisher_noise(noise)
    return fdkernels.flow_fisher_penalty(velocity.ours, obs, displacement, noise=start, bridge_noise=bridge)


def _fisher_noise(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Two noises (states, 4, d) made of one (states, K, d), so that all contestants have the same inputs."""
    repeats = -(-FISHER_SAMPLES // noise.shape[1])
    start = noise.repeat(1, repeats, 1)[:, :FISHER_SAMPLES]
    return start, start.roll(1, 0)


CONTESTANTS: dict[str, Penalty] = {"eager": eager, "ours": ours, "ours, Fisher": fisher}


def truth_of(
    variant: str, network: nn.Module, obs: Tensor, action: Tensor, displacement: Tensor, noise: Tensor
) -> Tensor:
    if variant == "ours, Fisher":
        start, bridge = _fisher_noise(noise)
        found = fdkernels_ref.flow_fisher_penalty(
            network, obs, displacement, num_samples=FISHER_SAMPLES, noise=start, bridge_noise=bridge
        )
        assert isinstance(found, Tensor)
        return found
    return fdkernels_ref.flow_pullback_penalty(
        network, obs, action, displacement, t=T, num_steps=STEPS, damping=DAMPING, bridge_noise=noise
    )


def cases() -> list[Any]:
    found = []
    for table in TABLES:
        for size in SIZES:
            names = [(name, table) for name in CONTESTANTS] + [("ours", "bf16")] * (not ON_GPU)
            for variant, kind in names:
                for timing in TIMINGS:
                    name = f"{variant}-{'x'.join(map(str, size))}-{kind}-{timing}"
                    found.append(pytest.param(variant, size, table, kind, timing, id=name))
    return found


@pytest.mark.parametrize(("variant", "size", "table", "kind", "timing"), cases())
def test_pullback(
    race: Race, variant: str, size: tuple[int, int, int, int], table: str, kind: str, timing: str
) -> None:
    states, num_samples, obs_dim, d = size
    rows, evaluations = states * num_samples * (1 + d), STEPS
    if variant == "ours, Fisher":
        rows, evaluations = states * FISHER_SAMPLES, 11
    entry = Entry(
        op="flow_pullback_penalty",
        variant=variant,
        sizes={"states": states, "K": num_samples, "obs": obs_dim, "d": d},
        detail=f"forward and backward{', ' + table if ON_GPU else ''}",
        timing=timing,
        precision=kind,
        baseline_precision=table,
        calls=10 if ON_GPU else 1,
        flops=flops(rows, obs_dim, d, evaluations, states),
        bytes=traffic(states, obs_dim, d) + 4.0 * states * num_samples * d,
    )
    velocity, exact = networks(obs_dim, d)
    inputs = [
        (
            normal(states, obs_dim, seed=5 * i),
            normal(states, d, seed=5 * i + 1).clamp(-1, 1),
            normal(states, d, seed=5 * i + 2, requires_grad=True),
            normal(states, num_samples, d, seed=5 * i + 3),
            normal(states, seed=5 * i + 4),
        )
        for i in range(3)
    ]

    def step(penalty: Callable[..., Tensor], network: Any, *tensors: Tensor) -> Outputs:
        *given, upstream = tensors
        out = penalty(network, *given)
        (gradient,) = torch.autograd.grad(out, given[2], upstream)
        return {"penalty": out.detach(), "gradient": gradient}

    def judge(i: int, outputs: Outputs) -> float:
        obs, action, displacement, noise, upstream = (tensor.detach().double() for tensor in inputs[i])
        penalty = functools.partial(truth_of, variant)
        truth = step(penalty, exact, obs, action, displacement.requires_grad_(), noise, upstream)
        return gate(entry, outputs, truth)

    def call(penalty: Penalty, kind: str, by_argument: bool) -> Callable[[int], Outputs]:
        if by_argument and kind == "bf16":
            penalty, kind = functools.partial(penalty, precision="bf16"), "fp32"

        def run(*tensors: Tensor) -> Outputs:
            with precision(kind):
                return step(penalty, velocity, *tensors)

        return rotating(run, inputs)

    contestant = call(CONTESTANTS[variant], kind, variant == "ours")
    race(entry, contestant, call(eager, table, False), judge, inputs=len(inputs))
