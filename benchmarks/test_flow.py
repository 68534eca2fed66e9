"""Integrating a flow, 4×512 wide, in ten Euler steps: the loop as people write it, compilers, torchdiffeq, and ours.

    pytest benchmarks --benchmark-only -k flow

"eager" is the loop of the published agents in PyTorch: concatenate, call the network, add. On CUDA each contestant runs
from Python and as a captured graph, in fp32, TF32 and bf16, against the eager loop in the same precision. On a CPU they
run in fp32, with bf16 contestants in the same table.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from benchmarks.harness import (
    DEVICE,
    ON_GPU,
    TIMINGS,
    Entry,
    Outputs,
    Race,
    gate,
    half_products,
    normal,
    precision,
    rotating,
)
from benchmarks.peers.eager_agent import mlp

STEPS, HIDDEN, WIDTH = 10, 4, 512
TABLES = ("fp32", "tf32", "bf16") if ON_GPU else ("fp32",)


class Networks(NamedTuple):
    """The same weights in two networks."""

    ours: fdkernels.VelocityMLP
    plain: nn.Sequential
    """PyTorch's own modules, which take [observation, x, t] concatenated."""


Integrate = Callable[[Networks, Tensor, Tensor], Tensor]


def eager(velocity: Networks, x: Tensor, obs: Tensor) -> Tensor:
    for i in range(STEPS):
        t = torch.full((*x.shape[:-1], 1), i / STEPS, device=x.device, dtype=x.dtype)
        x = x + velocity.plain(torch.cat([obs, x, t], dim=-1)) / STEPS
    return x.clamp(-1, 1)


def compiled(mode: str | None) -> Integrate:
    return torch.compile(eager, mode=mode, dynamic=False)


def torchdiffeq() -> Integrate:
    odeint = pytest.importorskip("torchdiffeq").odeint

    def integrate(velocity: Networks, x: Tensor, obs: Tensor) -> Tensor:
        def field(t: Tensor, x: Tensor) -> Tensor:
            return velocity.plain(torch.cat([obs, x, t.expand(*x.shape[:-1], 1)], dim=-1))

        times = torch.linspace(0, 1, STEPS + 1, device=x.device)
        return odeint(field, x, times, method="euler")[-1].clamp(-1, 1)

    return integrate


def ours(velocity: Networks, x: Tensor, obs: Tensor, precision: Any = None, implementation: Any = None) -> Tensor:
    options = {"precision": precision, "implementation": implementation}
    return fdkernels.integrate_flow(velocity.ours, x, obs, num_steps=STEPS, **options)


CONTESTANTS: dict[str, Callable[[], Integrate]] = {
    "eager": lambda: eager,
    "eager, torch.compile": lambda: compiled(None),
    # makes its own CUDA graphs, which cannot be captured in another one
    "eager, max-autotune": lambda: compiled("max-autotune"),
    "torchdiffeq": torchdiffeq,
    "ours": lambda: ours,
}
# "ours" takes the table's choice, which should be the fastest of these.
WAYS = ("streamed", "gemm") if ON_GPU else ()
WAYS += ("stationary",) if ON_GPU and torch.cuda.get_device_capability() == (9, 0) else ()
CONTESTANTS |= {f"ours, {way}": functools.partial(functools.partial, ours, implementation=way) for way in WAYS}


def networks(obs_dim: int, d: int) -> tuple[Networks, fdkernels.VelocityMLP]:
    """A velocity in float32 for the contestants, and the same in float64 for the judge.

    A fresh network's velocities are small beside the noise that they are added to, which would hide errors. Here they
    are about half as large as the noise.
    """
    torch.manual_seed(0)
    velocity = fdkernels.VelocityMLP(obs_dim, d, (WIDTH,) * HIDDEN).to(DEVICE)
    with torch.no_grad():
        velocity.net[-1].weight.mul_(20)  # type: ignore[operator]
    plain = mlp(obs_dim + d + 1, (WIDTH,) * HIDDEN, d, layer_norm=False).to(DEVICE)
    plain.load_state_dict(velocity.net.state_dict())
    return Networks(velocity, plain), copy.deepcopy(velocity).double()


def flops(rows: int, obs_dim: int, d: int, evaluations: int = STEPS, states: int | None = None) -> float:
    """Multiplications and additions that the products need; layer 1 multiplies each state only once."""
    per_step = (d + 1) * WIDTH + (HIDDEN - 1) * WIDTH**2 + WIDTH * d
    return 2.0 * (evaluations * rows * per_step + (states or rows) * obs_dim * WIDTH)


def traffic(rows: int, obs_dim: int, d: int) -> float:
    """Bytes of weights, states, noise and actions."""
    weights = (obs_dim + d + 1) * WIDTH + (HIDDEN - 1) * WIDTH**2 + WIDTH * d + HIDDEN * WIDTH + d
    return 4.0 * (weights + rows * (obs_dim + 2 * d))


def marks(variant: str, rows: int, table: str, kind: str) -> list[Any]:
    """Pytest marks of the cases that a short run leaves out."""
    if variant == "eager" and kind == "bf16" and rows > 1 and not half_products():
        return [pytest.mark.long("PyTorch's bfloat16 products take seconds a call on a processor without units for it")]
    if not ON_GPU and rows == 16384:
        return [pytest.mark.long("16,384 rows take seconds a call on a CPU")]
    if ON_GPU and variant.startswith("eager, ") and table != "tf32":
        return [pytest.mark.long("compiling takes its time, and the table of TF32 has it")]
    if ON_GPU and "max-autotune" in variant and rows not in (256, 1536):
        return [pytest.mark.long("tuning takes a minute, and 256 and 1,536 rows have it")]
    return []


def cases() -> list[Any]:
    found = []
    for table in TABLES:
        for rows, obs_dim, d in [(1, 17, 6), (256, 17, 6), (256, 29, 8), (1536, 17, 6), (16384, 17, 6)]:
            # stationary weights only support TF32 and half precision
            names = [(name, table) for name in CONTESTANTS if (name, table) != ("ours, stationary", "fp32")]
            if not ON_GPU:
                names += [("eager", "bf16"), ("ours", "bf16")]
            if (rows, obs_dim) == (256, 29):  # a larger robot changes only layer 1
                names = [(name, kind) for name, kind in names if name in ("eager", "ours")]
            for (variant, kind), timing in itertools.product(names, TIMINGS):
                if timing == "graph" and variant in ("eager, max-autotune", "torchdiffeq"):  # cannot be captured
                    continue
                case = (variant, (rows, obs_dim, d), table, kind, timing)
                name = f"{variant}-{rows}x{obs_dim}x{d}-{kind}-{timing}"
                found.append(pytest.param(*case, id=name, marks=marks(variant, rows, table, kind)))
    return found


@pytest.mark.parametrize(("variant", "size", "table", "kind", "timing"), cases())
def test_flow(race: Race, variant: str, size: tuple[int, int, int], table: str, kind: str, timing: str) -> None:
    rows, obs_dim, d = size
    entry = Entry(
        op="integrate_flow",
        variant=variant,
        sizes={"rows": rows, "obs": obs_dim, "d": d},
        detail=table if ON_GPU else "",
        timing=timing,
        precision=kind,
        baseline_precision=table,
        calls=10 if ON_GPU else 1,
        flops=flops(rows, obs_dim, d),
        bytes=traffic(rows, obs_dim, d),
    )
    velocity, exact = networks(obs_dim, d)
    inputs = [(normal(rows, d, seed=2 * i), normal(rows, obs_dim, seed=2 * i + 1)) for i in range(3)]

    @torch.no_grad()
    def judge(i: int, outputs: Outputs) -> float:
        x, obs = (tensor[:1024].double() for tensor in inputs[i])  # enough, because all rows are alike
        return gate(entry, {"x": outputs["x"][:1024]}, {"x": fdkernels_ref.integrate_flow(exact, x, obs)})

    def call(function: Integrate, kind: str, by_argument: bool) -> Callable[[int], Outputs]:
        if by_argument and kind == "bf16":
            function, kind = functools.partial(function, precision="bf16"), "fp32"

        @torch.no_grad()
        def run(x: Tensor, obs: Tensor) -> Outputs:
            with precision(kind):
                return {"x": function(velocity, x, obs)}

        return rotating(run, inputs)

    contestant = call(CONTESTANTS[variant](), kind, variant == "ours")
    race(entry, contestant, call(eager, table, False), judge, inputs=len(inputs))
