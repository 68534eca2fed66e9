"""The whole decorator: K samples of the flow per state, their scores, the penalty and its gradient with respect to δ.

    pytest benchmarks --benchmark-only -k decorator

"eager" is written like the published agent: rows repeated K times, a loop over steps, d×d matrices. "our parts" calls
our operators one after the other, "ours" is `flow_fisher_penalty`. All get the same noise.
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
from benchmarks.test_flow import STEPS, Networks, flops, networks, traffic
from benchmarks.test_flow import eager as eager_flow

T, DAMPING = 0.95, 1e-3
TABLES = ("fp32", "tf32", "bf16") if ON_GPU else ("fp32",)
Penalty = Callable[[Networks, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(velocity: Networks, obs: Tensor, displacement: Tensor, noise: Tensor, bridge_noise: Tensor) -> Tensor:
    batch, num_samples, d = noise.shape
    with torch.no_grad():
        obs = obs.repeat_interleave(num_samples, dim=0)
        sample = eager_flow(velocity, noise.reshape(-1, d), obs)
        x_t = (1 - T) * bridge_noise.reshape(-1, d) + T * sample
        t = torch.full_like(x_t[:, :1], T)
        score = (T * velocity.plain(torch.cat([obs, x_t, t], dim=-1)) - x_t) / (1 - T)
        score = score.float().view(batch, num_samples, d)
        fisher = (score.unsqueeze(-1) * score.unsqueeze(-2)).mean(1) + DAMPING * torch.eye(d, device=score.device)
        trace = fisher.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-6)
        fisher = fisher / trace[:, None, None]
    return torch.einsum("bi,bij,bj->b", displacement, fisher, displacement) / d


def parts(
    velocity: Networks, obs: Tensor, displacement: Tensor, noise: Tensor, bridge_noise: Tensor, precision: Any = None
) -> Tensor:
    with torch.no_grad():
        obs = obs.unsqueeze(1).expand(-1, noise.shape[1], -1)
        sample = fdkernels.integrate_flow(velocity.ours, noise, obs, num_steps=STEPS, precision=precision)
        x_t = (1 - T) * bridge_noise + T * sample
        score = fdkernels.velocity_to_score(velocity.ours(x_t, torch.full_like(x_t[..., :1], T), obs), x_t, T)
    return fdkernels.fisher_penalty(displacement, score, damping=DAMPING)


def ours(
    velocity: Networks, obs: Tensor, displacement: Tensor, noise: Tensor, bridge_noise: Tensor, precision: Any = None
) -> Tensor:
    return fdkernels.flow_fisher_penalty(
        velocity.ours, obs, displacement, noise=noise, bridge_noise=bridge_noise, num_steps=STEPS, t=T, damping=DAMPING,
        precision=precision,
    )  # fmt: skip


CONTESTANTS: dict[str, Callable[[], Penalty]] = {
    "eager": lambda: eager,
    "eager, torch.compile": lambda: torch.compile(eager, dynamic=False),
    "our parts": lambda: parts,
    "ours": lambda: ours,
}


def cases() -> list[Any]:
    found = []
    for table in TABLES:
        for size in [(256, 4, 17, 6), (256, 8, 29, 8)] + [(4096, 4, 17, 6)] * ON_GPU:
            names = [(name, table) for name in CONTESTANTS] + [("ours", "bf16")] * (not ON_GPU)
            for variant, kind in names:
                short = "compile" not in variant or (size[:2] == (256, 4) and table in ("fp32", "tf32")[ON_GPU:])
                marks = [] if short else [pytest.mark.long("compiling takes a minute, and another size has it")]
                for timing in TIMINGS:
                    name = f"{variant}-{'x'.join(map(str, size))}-{kind}-{timing}"
                    found.append(pytest.param(variant, size, table, kind, timing, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("variant", "size", "table", "kind", "timing"), cases())
def test_decorator(
    race: Race, variant: str, size: tuple[int, int, int, int], table: str, kind: str, timing: str
) -> None:
    states, num_samples, obs_dim, d = size
    rows = states * num_samples
    entry = Entry(
        op="flow_fisher_penalty",
        variant=variant,
        sizes={"states": states, "K": num_samples, "obs": obs_dim, "d": d},
        detail=f"forward and backward{', ' + table if ON_GPU else ''}",
        timing=timing,
        precision=kind,
        baseline_precision=table,
        calls=10 if ON_GPU else 1,
        flops=flops(rows, obs_dim, d, STEPS + 1, states),
        bytes=traffic(states, obs_dim, d) + 8.0 * rows * d,
    )
    velocity, exact = networks(obs_dim, d)
    inputs = [
        (
            normal(states, obs_dim, seed=5 * i),
            normal(states, d, seed=5 * i + 1, requires_grad=True),
            normal(states, num_samples, d, seed=5 * i + 2),
            normal(states, num_samples, d, seed=5 * i + 3),
            normal(states, seed=5 * i + 4),
        )
        for i in range(3)
    ]

    def step(penalty: Callable[..., Tensor], network: Networks | nn.Module, *tensors: Tensor) -> Outputs:
        *given, upstream = tensors
        out = penalty(network, *given)
        (gradient,) = torch.autograd.grad(out, given[1], upstream)
        return {"penalty": out.detach(), "gradient": gradient}

    def judge(i: int, outputs: Outputs) -> float:
        obs, displacement, noise, bridge_noise, upstream = (tensor.detach().double() for tensor in inputs[i])
        reference = functools.partial(fdkernels_ref.flow_fisher_penalty, num_steps=STEPS, t=T, damping=DAMPING)

        def penalty(network: nn.Module, obs: Tensor, displacement: Tensor, noise: Tensor, bridge: Tensor) -> Tensor:
            return reference(network, obs, displacement, num_samples=num_samples, noise=noise, bridge_noise=bridge)  # type: ignore[return-value]

        truth = step(penalty, exact, obs, displacement.requires_grad_(), noise, bridge_noise, upstream)
        return gate(entry, outputs, truth)

    def call(penalty: Penalty, kind: str, by_argument: bool) -> Callable[[int], Outputs]:
        if by_argument and kind == "bf16":
            penalty, kind = functools.partial(penalty, precision="bf16"), "fp32"

        def run(*tensors: Tensor) -> Outputs:
            with precision(kind):
                return step(penalty, velocity, *tensors)

        return rotating(run, inputs)

    contestant = call(CONTESTANTS[variant](), kind, variant == "ours")
    race(entry, contestant, call(eager, table, False), judge, inputs=len(inputs))
