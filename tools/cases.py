"""The calls to compile ahead of time: every launcher, on the method's sizes and on awkward ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from fdkernels.kernels.flow import launch as flow_launch
from fdkernels.kernels.penalty import launch as penalty_launch
from fdkernels.kernels.score import launch as score_launch
from fdkernels.kernels.tuning.plans import lanes
from fdkernels.kernels.tuning.table import TABLE
from fdkernels.layers import EncodedNetwork, Layer, Norm, encode
from fdkernels.records import Affine, Chain, Noise, PenaltyRule, TimedAffine, Way
from fdkernels.solvers import Solver

# (K, d): the method's sizes, rows that vectors do not divide, one number per row, and rows read in blocks of K.
SHAPES = [(4, 6), (4, 8), (1, 1), (5, 7), (3, 17), (16, 60), (256, 1023), (256, 1024)]
NUM_ROWS = 4096


def calls(dtype: torch.dtype, num_samples: int, d: int) -> Iterator[tuple[str, Any, tuple]]:
    """Every launcher of the penalty and the score, on tensors of one dtype."""
    displacement = torch.empty(NUM_ROWS, d, dtype=dtype, device="meta")
    score = torch.empty(NUM_ROWS, num_samples, d, dtype=dtype, device="meta")
    trace = torch.empty(NUM_ROWS, device="meta")
    pairs = torch.empty(NUM_ROWS, num_samples, 2, device="meta")
    rule, affine, by_row = PenaltyRule(1e-3, True, 1e-6), Affine(None, 1.0, 0.0, True), Affine(pairs, 1.0, 0.0, True)
    yield "penalty", penalty_launch.penalty, (displacement, score, rule, False, False)
    yield "penalty+gradient", penalty_launch.penalty, (displacement, score, rule, True, True)
    velocity = (displacement, score, score, by_row, rule, True)
    yield "velocity_penalty+gradient", penalty_launch.velocity_penalty, velocity
    backward = (trace, displacement, score, trace, trace, rule)
    yield "penalty_score_gradient", penalty_launch.score_gradient, backward
    yield "score", score_launch.score, (score, score, affine)
    yield "score+times", score_launch.score, (score, score, by_row)


class FlowCase(NamedTuple):
    """A network and the options of its calls, with the table's entry for it."""

    implementation: str
    precision: str
    rows: int = 256
    width: int = 512
    depth: int = 4
    cond_dim: int = 17
    d: int = 6
    norm: str = "none"
    models: int = 1
    num_samples: int = 4
    seed: bool = False
    times: bool = False
    half_weights: bool = True
    shipped: bool = False
    """Whether the table's entry was chosen for this size; other cases only have to compile and fit."""

    def network(self, weights: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> EncodedNetwork:
        """The network of these weights and biases. A norm uses its layer's bias as scale and shift."""
        layers = []
        for weight, bias in weights:
            norm = Norm(bias, bias, 1e-6)
            before, after = (norm if self.norm == place else None for place in ("before", "after"))
            layers.append(Layer(weight, bias, before, "gelu_tanh", after))
        return encode(layers, ("cond", "x", "t") if self.cond_dim else ("x", "t"))


def flow_cases(architecture: str, dtype: torch.dtype) -> Iterator[FlowCase]:
    """The sizes that the table was made for, and others that the kernels support."""
    precision = "high" if dtype == torch.float32 else "bf16" if dtype == torch.bfloat16 else "fp16"
    for entry in TABLE.get(architecture, {}).get("flow", []):
        half = precision if dtype.itemsize == 2 else "bf16"
        named = half if entry["precision"] == "half" else entry["precision"]
        if (entry["precision"] == "half") == (dtype.itemsize == 2):
            yield FlowCase(entry["implementation"], named, entry["problem_rows"], entry["width"], shipped=True)
    streamed = FlowCase("streamed", precision)
    yield streamed._replace(width=300)
    yield streamed._replace(cond_dim=0, depth=1, seed=True)
    yield streamed._replace(d=128, times=True)
    yield streamed._replace(norm="after", models=8)
    yield streamed._replace(norm="before", num_samples=5)
    if architecture == "sm_90":
        yield FlowCase("stationary", precision, d=64, cond_dim=0, seed=True)
        yield FlowCase("stationary", precision, rows=512, models=2, times=True, half_weights=False)


def flow_calls(case: FlowCase, dtype: torch.dtype) -> Iterator[tuple[str, Any, tuple]]:
    """The solve (with all its states if the times vary), the chain to the penalty, and a streamed solve's Jacobian."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = dtype if case.half_weights else torch.float32
    width, depth, cond_dim, d, models = case.width, case.depth, case.cond_dim, case.d, case.models
    sizes = [(width, cond_dim + d + 1), *[(width, width)] * (depth - 1), (d, width)]
    network = case.network([(empty(*size, dtype=weights), empty(size[0], dtype=weights)) for size in sizes])
    if models > 1:
        stacked = [None if p is None else p.expand(models, *p.shape).contiguous() for p in network.parameters]
        network = network._replace(parameters=stacked)
    rows = empty(models, case.rows, d)
    cond = empty(models, case.rows, cond_dim) if cond_dim else None
    solver, way = Solver([0.0, 1.0], "euler", -1.0, 1.0, "end"), Way(case.precision, case.implementation)
    yield "flow", flow_launch.integrate, (rows, cond, network, solver, case.times, way)
    states = empty(models, max(1, case.rows // case.num_samples), d)
    noise = None if case.seed else empty(models, states.shape[1] * case.num_samples, d)
    obs = None if cond is None else cond[:, : states.shape[1]].contiguous()
    seed = empty(dtype=torch.int64) if case.seed else None
    columns = empty(models, states.shape[1] * case.num_samples, 5, dtype=torch.float32) if case.times else None
    drawn = Noise(noise, noise, seed, case.num_samples)
    at = TimedAffine(columns, t=0.95, alpha=None, sigma=None, p=19.0, q=-20.0, use_x=True)
    rule = PenaltyRule(1e-3, True, 1e-6)
    yield "chain", flow_launch.fisher, (Chain(drawn, obs, states, at, network, solver, rule, case.times, way),)
    if case.implementation == "streamed":
        starts = empty(models, max(1, case.rows // math.prod(lanes(d))), d)
        conds = None if cond is None else cond[:, : starts.shape[1]].contiguous()
        yield "jacobian", flow_launch.jacobian, (starts, conds, network, solver, way)
