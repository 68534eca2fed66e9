"""Triton's runtime binds the arguments of every launch, records included, and compiles, up to where it needs a driver.

The stand-in of ``tools/aot.py`` derives the arguments' types by itself; here the runtime does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tools.aot import AheadOfTime, Compiler
from tools.cases import calls, flow_calls, flow_cases


class AtRunTime(AheadOfTime):
    """Binds, specialises and compiles like ``JITFunction.run``."""

    def __call__(self, *args: Any, **given: Any) -> None:
        backend = make_backend(self.target)
        given.pop("launch_cooperative_grid", None)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*args, **given)
        types = [kind for kind, _ in specialization]
        constants = find_paths_if(types, lambda _, kind: kind == "constexpr")
        attributes = [attribute for _, attribute in specialization]
        attributed = find_paths_if(attributes, lambda _, attribute: isinstance(attribute, str))
        source = ASTSource(
            self.kernel,
            dict(zip(self.kernel.arg_names, types)),
            {path: get_iterable_path(list(bound.values()), path) for path in constants},
            {path: backend.parse_attr(get_iterable_path(attributes, path)) for path in attributed},
        )
        options = backend.parse_options(options).__dict__
        self.found.append({"ptx": triton.compile(source, target=self.target, options=options).asm["ptx"]})


def test_every_kernel_binds_and_compiles() -> None:
    cases = {case.implementation: case._replace(times=True) for case in flow_cases("sm_90", torch.bfloat16)}
    assert set(cases) == {"stationary", "streamed", "gemm"}
    with Compiler("sm_90", AtRunTime) as compiler:
        for _, launcher, arguments in calls(torch.bfloat16, 4, 6):
            assert compiler.compile(launcher, arguments)
        for case in cases.values():
            for _, launcher, arguments in flow_calls(case._replace(width=64, depth=2, rows=64), torch.bfloat16):
                assert all("ret;" in found["ptx"] for found in compiler.compile(launcher, arguments))
