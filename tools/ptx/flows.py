"""Test problems for the emulator: a network and rows for a case of the static report, their launches, and the truth."""

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
from fdkernels.kernels.flow import launch
from fdkernels.kernels.tuning import plans
from fdkernels.philox import philox_normal
from fdkernels.records import Chain, Noise, PenaltyRule, TimedAffine, Way
from fdkernels.solvers import Solver
from tools.cases import FlowCase
from tools.ptx.run import emulate

AT = TimedAffine(None, t=0.75, alpha=None, sigma=None, p=3.0, q=-4.0, use_x=True)
SEED = 2**40 + 17


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


class Problem:
    """A network and rows for a case of the static report, with its constants, so that the compiled kernel is the same.

    The plan is the table's for ``case.rows``, however few ``states`` there are.
    """

    def __init__(self, case: FlowCase, states: int, dtype: torch.dtype, steps: int = 2) -> None:
        self.case, self.states, self.steps = case, states, steps
        d, width, models = case.d, case.width, case.models
        hidden = (width,) * case.depth
        weights = dtype if case.half_weights else torch.float32
        lead = (models,) if models > 1 else ()
        parameters: list[Tensor | None] = []
        for fan_in, out in itertools.pairwise([case.cond_dim + d + 1, *hidden, d]):
            weight, bias = draw(*lead, out, fan_in) / fan_in**0.5, draw(*lead, out) / 4
            norm = (1 + draw(*lead, out) / 4, draw(*lead, out) / 4) if case.norm != "none" else (None, None)
            parameters += [None if p is None else p.to(weights) for p in (weight, bias, *norm)]
        self.parameters = parameters
        of_one = [(p[0] if models > 1 else p) for p in parameters if p is not None]
        step = 2 if case.norm == "none" else 4
        self.network = case.network(zip(of_one[::step], of_one[1::step]))._replace(parameters=parameters)
        rows = states * case.num_samples
        self.obs = draw(models, states, case.cond_dim, dtype=dtype) if case.cond_dim else None
        self.start, self.bridge = draw(models, rows, d, dtype=dtype), draw(models, rows, d, dtype=dtype)
        self.displacement = draw(models, states, d, dtype=dtype)
        self.columns = torch.rand(models, rows, 5) if case.times else None
        self.seed = torch.tensor(SEED) if case.seed else None
        if case.seed:
            whole, total = (models, rows, d), models * rows * d
            self.start, self.bridge = (
                philox_normal(SEED, whole, "cpu", torch.float32, first=first) for first in (0, total)
            )
        bounds = (-100.0, 100.0, "end")  # never reached
        self.solver = Solver([step / steps for step in range(steps + 1)], "euler", *bounds)
        self.way = Way(case.precision, case.implementation)

    def velocity(self, model: int) -> Callable[[Tensor, Tensor, Any], Tensor]:
        own: list[Any] = [
            p if p is None else p.double()[model] if self.case.models > 1 else p.double() for p in self.parameters
        ]
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
        """All states of the solve, the penalty and its gradient, from the reference in float64."""
        paths, penalties, gradients = [], [], []
        for model in range(self.case.models):
            velocity, start, bridge = self.velocity(model), self.start[model].double(), self.bridge[model].double()
            k, d = self.case.num_samples, self.case.d
            cond = None if self.obs is None else self.obs[model].double().repeat_interleave(k, 0)
            path = fdkernels_ref.integrate_flow(
                velocity, start, cond, num_steps=self.steps, clip=None, return_path=True
            )
            t, alpha, sigma, p, q = (
                (AT.t, AT.t, 1 - AT.t, AT.p, AT.q)
                if self.columns is None
                else self.columns[model].double()[..., None].unbind(1)
            )
            x = sigma * bridge + alpha * path[-1]
            score = p * velocity(x, torch.ones_like(x[:, :1]) * t, cond) + q * x
            leaf = self.displacement[model].double().requires_grad_()
            penalty = fdkernels_ref.fisher_penalty(leaf, score.reshape(self.states, k, d))
            gradients.append(torch.autograd.grad(penalty.sum(), leaf)[0])
            paths.append(path)
            penalties.append(penalty.detach())
        return torch.stack(paths, 1), torch.stack(penalties), torch.stack(gradients)

    def integrate(self, architecture: str, **options: Any) -> Tensor:
        """The samples, or all states of the solve if the case's times vary."""
        cond = None if self.obs is None else self.obs.repeat_interleave(self.case.num_samples, 1)
        with self.entry():
            return emulate(
                architecture, launch.integrate, self.start, cond, self.network, self.solver, self.case.times, self.way,
                **options,
            )  # fmt: skip

    def fisher(self, architecture: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        start, bridge = (None, None) if self.seed is not None else (self.start, self.bridge)
        call = Chain(
            Noise(start, bridge, self.seed, self.case.num_samples), self.obs, self.displacement,
            AT._replace(columns=self.columns), self.network, self.solver, PenaltyRule(1e-3, True, 1e-6),
            self.case.times, self.way,
        )  # fmt: skip
        with self.entry():
            return emulate(architecture, launch.fisher, call, **options)

    def true_jacobian(self) -> tuple[Tensor, Tensor]:
        """The ends of the solve and their Jacobians, from the reference in float64."""
        found = []
        for model in range(self.case.models):
            cond = None if self.obs is None else self.obs[model].double().repeat_interleave(self.case.num_samples, 0)
            velocity, start = self.velocity(model), self.start[model].double()
            found.append(fdkernels_ref.flow_jacobian(velocity, start, cond, num_steps=self.steps, clip=None))
        end, jacobian = map(torch.stack, zip(*found))
        return end, jacobian

    def jacobian(self, architecture: str, **options: Any) -> tuple[Tensor, Tensor]:
        with self.entry():
            arguments = self.start, self.obs, self.network, self.solver, self.way
            return emulate(architecture, launch.jacobian, *arguments, **options)

    @contextlib.contextmanager
    def entry(self) -> Iterator[None]:
        """A context in which launchers take the table's plan for the case's number of rows."""

        def plan(problem: plans.Problem, *args: Any) -> plans.FlowPlan:
            return plans.flow_plan(problem._replace(states=self.case.rows // problem.num_samples), *args)

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.case.precision == "high" else "highest")  # "gemm" requires it
        try:
            with mock.patch.object(launch, "flow_plan", plan):
                yield
        finally:
            torch.set_float32_matmul_precision(before)
