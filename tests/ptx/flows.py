"""A network and rows for a case of the static report, the launch of its kernels on the emulator, and the truth."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fdkernels_ref
from benchmarks.static_report import FlowCase
from fdkernels.kernels import configs, launch_flow
from fdkernels.kernels.architecture import Architecture
from fdkernels.philox import philox_normal
from tests.ptx.run import emulate

P, Q, T = 3.0, -4.0, 0.75
SEED = 2**40 + 17


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


class Problem:
    """A network and rows for a case of the static report, whose constants it shares: the compiled kernel is the same.

    The table's entry is that of ``case.rows``, however few ``states`` there are.
    """

    def __init__(self, case: FlowCase, states: int, dtype: torch.dtype, steps: int = 2) -> None:
        self.case, self.states, self.steps = case, states, steps
        d, width, models = case.d, case.width, case.models
        order = ("cond", "x", "t") if case.cond_dim else ("x", "t")
        hidden = (width,) * case.depth
        net = Architecture(
            case.cond_dim,
            d,
            order,
            hidden,
            ("gelu_tanh",) * case.depth,
            (case.norm,) * case.depth,
            (1e-6,) * case.depth,
        )
        self.parameters: list[Tensor | None] = []
        weights = dtype if case.half_weights else torch.float32
        lead = (models,) if models > 1 else ()
        for out, fan_in in itertools.pairwise([case.cond_dim + d + 1, *hidden, d]):
            out, fan_in = fan_in, out
            weight, bias = draw(*lead, out, fan_in) / fan_in**0.5, draw(*lead, out) / 4
            norm = (1 + draw(*lead, out) / 4, draw(*lead, out) / 4) if case.norm != "none" else (None, None)
            self.parameters += [None if p is None else p.to(weights) for p in (weight, bias, *norm)]
        rows = states * case.num_samples
        self.obs = draw(models, states, case.cond_dim, dtype=dtype) if case.cond_dim else None
        self.start, self.bridge = draw(models, rows, d, dtype=dtype), draw(models, rows, d, dtype=dtype)
        self.displacement = draw(models, states, d, dtype=dtype)
        self.triples = torch.rand(models, rows, 3) if case.times else None
        self.seed = torch.tensor(SEED) if case.seed else None
        if case.seed:
            whole, total = (models, rows, d), models * rows * d
            self.start, self.bridge = (
                philox_normal(SEED, whole, "cpu", torch.float32, first=first) for first in (0, total)
            )
        table = tuple(x for step in range(steps) for x in (step / steps, 0.0, 1 / steps, 1.0))
        self.solver = (net.encode(), table, -100.0, 100.0, "end")  # bounds that nothing reaches
        self.how = (case.precision, case.implementation)

    def velocity(self, model: int) -> Callable[[Tensor, Tensor, Any], Tensor]:
        own = [p if p is None else p.double()[model] if self.case.models > 1 else p.double() for p in self.parameters]
        layers = [own[i : i + 4] for i in range(0, len(own), 4)]

        def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            h = torch.cat([*([] if cond is None else [cond]), x, t], -1)
            for weight, bias, scale, shift in layers[:-1]:
                h = F.linear(h, weight, bias)
                if self.case.norm == "before":
                    h = F.layer_norm(h, h.shape[-1:], scale, shift, 1e-6)
                h = F.gelu(h, approximate="tanh")
                if self.case.norm == "after":
                    h = F.layer_norm(h, h.shape[-1:], scale, shift, 1e-6)
            return F.linear(h, *layers[-1][:2])

        return velocity

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """All states of the solve, the penalty and its gradient."""
        paths, penalties, gradients = [], [], []
        for model in range(self.case.models):
            velocity, start, bridge = self.velocity(model), self.start[model].double(), self.bridge[model].double()
            k, d = self.case.num_samples, self.case.d
            cond = None if self.obs is None else self.obs[model].double().repeat_interleave(k, 0)
            path = fdkernels_ref.integrate_flow(
                velocity, start, cond, num_steps=self.steps, clip=None, return_path=True
            )
            t, p, q = [T, P, Q] if self.triples is None else self.triples[model].double()[..., None].unbind(1)
            x = (1 - t) * bridge + t * path[-1]
            score = p * velocity(x, torch.ones_like(x[:, :1]) * t, cond) + q * x
            leaf = self.displacement[model].double().requires_grad_()
            penalty = fdkernels_ref.fisher_penalty(leaf, score.reshape(self.states, k, d))
            gradients.append(torch.autograd.grad(penalty.sum(), leaf)[0])
            paths.append(path)
            penalties.append(penalty.detach())
        return torch.stack(paths, 1), torch.stack(penalties), torch.stack(gradients)

    def integrate(self, architecture: str, **options: Any) -> Tensor:
        """The samples, or all states where the case's times vary."""
        cond = None if self.obs is None else self.obs.repeat_interleave(self.case.num_samples, 1)
        args = (self.start, cond, self.parameters, *self.solver, self.case.times, *self.how)
        with self.entry():
            return emulate(architecture, launch_flow.integrate, *args, **options)

    def fisher(self, architecture: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        noise = (None, None) if self.seed is not None else (self.start, self.bridge)
        chain = (*noise, self.obs, self.displacement, self.triples, self.parameters, self.seed, *self.solver)
        more = (self.case.num_samples, T, P, Q, True, 1e-3, True, 1e-6, self.case.times)
        with self.entry():
            return emulate(architecture, launch_flow.fisher, *chain, *more, *self.how, **options)

    @contextlib.contextmanager
    def entry(self) -> Iterator[None]:
        """Within it, the plan is the table's for the case's number of rows."""

        def plan(*args: Any) -> configs.FlowPlan:
            return configs.flow_plan(*args[:6], self.case.rows // args[7], *args[7:])

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.case.precision == "high" else "highest")  # as "gemm" wants it
        try:
            with mock.patch.object(launch_flow, "flow_plan", plan):
                yield
        finally:
            torch.set_float32_matmul_precision(before)
