"""The public functions: what a good call of each looks like, and what the reference makes of its arguments."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fdkernels
import fdkernels_ref
from fdkernels.networks import PackedMLP
from fdkernels.philox import _uniform, philox, philox_normal
from fdkernels.validation import is_integer, is_number
from fdkernels_ref.paths import data_time, path_of
from tests.fuzz import values

DTYPES = ("float32", "float32", "float64", "bfloat16", "float16")
LEADS = st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 0)])
LAYOUTS = st.sampled_from(["", "", "grad", "strided", "transposed grad", "expanded"])
Draw = Callable[[st.SearchStrategy[Any]], Any]
Arguments = dict[str, str]


class Public(NamedTuple):
    name: str
    function: Callable[..., Any]
    good: st.SearchStrategy[Arguments]
    """Texts of arguments that must be taken."""
    reference: Callable[..., Any]
    """Called with the same arguments, tensors and networks in one dtype and numbers as Python has them."""
    odd: dict[str, list[str]]
    """Odd values of an argument's own kind."""

    def parameters(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)

    def text(self, arguments: Arguments) -> str:
        path = f"fdkernels.{self.name}" if hasattr(fdkernels, self.name) else self.name
        return f"{path}({', '.join(f'{name}={text}' for name, text in arguments.items())})"


def tensor(draw: Draw, shape: tuple[int, ...], dtype: str) -> str:
    return f"tensor({shape}, {dtype!r}, {draw(LAYOUTS)!r}, {draw(st.integers(0, 99))})"


def some(draw: Draw, **choices: list[str]) -> Arguments:
    """Some of these options."""
    return {name: draw(st.sampled_from(texts)) for name, texts in choices.items() if draw(st.integers(0, 2)) == 0}


PENALTY = {
    "damping": ["0.0", "1e-3", "2", "Fraction(1, 3)", "np.float32(0.5)", "np.int64(1)"],
    "normalize": ["'trace'", "'none'"],
    "eps": ["1e-6", "10", "np.float64(0.5)"],
    "reduction": ["'none'", "'mean'", "'sum'"],
    "backend": ["None", "'torch'"],
}
PATHS = ["'linear'", "'linear_reversed'", "'vp'", "'cosine'", values.PATHS[0]]
SCORE = {
    "path": PATHS,
    "convention": ["'exact'"],
    "min_sigma": ["0.0", "1e-6", "0.5", "Fraction(1, 7)"],
    "backend": ["None", "'torch'"],
}
SOLVER = {
    "path": PATHS,
    "num_steps": ["1", "3", "np.int64(2)"],
    "method": ["'euler'", "'midpoint'", "'heun'", "'rk4'"],
    "time_grid": ["None", "[0.0, 0.3, 1.0]", "(1, 0.5, 0)", "torch.tensor([0.0, 0.5])", "np.array([0.25, 1.0])"],
    "clip": ["None", "(-1.0, 1.0)", "[-0.5, inf]", "(0, 0)", "(np.float32(-1), 1)"],
    "backend": ["None", "'torch'"],
    "implementation": ["None"],
}
TIMES = ["0.5", "0.25", "Fraction(1, 3)", "np.float32(0.75)", "np.float16(0.5)", "0.999"]
SIZES = st.integers(1, 4)
EVENTS = st.one_of(st.tuples(SIZES), st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES))
"""The shape of an action; half of the time, hypothesis draws a simple one."""


def of_event(event: tuple[int, ...]) -> Arguments:
    return {} if len(event) == 1 else {"event_dim": str(len(event))}


def ones(event: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a time of one action."""
    return (1,) * len(event)


def clips(draw: Draw, options: Arguments) -> Arguments:
    if options.get("clip", "") != "None":
        options |= some(draw, clip_each_step=["True", "False", "np.bool_(True)"])
    return options


@st.composite
def fisher_penalty(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    given = {"displacement": tensor(draw, (*lead, *event), dtype), "score": tensor(draw, (*lead, k, *event), dtype)}
    return given | of_event(event) | some(draw, **PENALTY)


def times(draw: Draw, shape: tuple[int, ...], dtype: str) -> str:
    shape = draw(st.sampled_from([shape, (*(1 for _ in shape[:-1]), 1), (1,), ()]))
    return draw(st.sampled_from(TIMES) | st.just(f"torch.sigmoid({tensor(draw, shape, dtype)})"))


@st.composite
def velocity_to_score(draw: Draw) -> Arguments:
    lead, d, dtype = draw(LEADS), draw(SIZES), draw(st.sampled_from(DTYPES))
    given = {"velocity": tensor(draw, (*lead, d), dtype), "x": tensor(draw, (*lead, d), dtype)}
    return given | {"t": times(draw, (*lead, 1), dtype)} | some(draw, **SCORE)


@st.composite
def velocity_fisher_penalty(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    rows = (*lead, k, *event)
    given = {"displacement": tensor(draw, (*lead, *event), dtype), "velocity": tensor(draw, rows, dtype)}
    given |= {"x": tensor(draw, rows, dtype), "t": times(draw, (*lead, k, *ones(event)), dtype)} | of_event(event)
    return given | some(draw, **PENALTY, **{name: texts for name, texts in SCORE.items() if name != "backend"})


@st.composite
def fisher_spectrum(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    score = tensor(draw, (*lead, k, *event), dtype)
    return {"score": score} | of_event(event) | some(draw, damping=PENALTY["damping"])


def velocity(draw: Draw, event: tuple[int, ...], cond_dim: int, dtype: str) -> str:
    how = draw(st.sampled_from(["", "packed", "norm", "packed norm", "field"]))
    if how == "field":
        return "field" if len(event) == 1 else "chunk_field"
    return f"network({math.prod(event)}, {cond_dim}, {dtype!r}, {how!r})"


def condition(draw: Draw, lead: tuple[int, ...], cond_dim: int, dtype: str) -> str:
    if not cond_dim:
        return "None"
    shared = draw(st.sampled_from([lead, (*lead[:-1], 1) if lead else (), ()]))
    return tensor(draw, (*shared, cond_dim), dtype)


def precision(draw: Draw, dtype: str) -> Arguments:
    return some(draw, precision=["None", "'highest'"] + ([] if dtype == "float64" else ["'high'", "'bf16'"]))


@st.composite
def integrate_flow(draw: Draw) -> Arguments:
    given = flow(draw)
    return given | clips(draw, some(draw, **SOLVER, return_path=["True"], differentiable=["True", "False"]))


def flow(draw: Draw) -> Arguments:
    lead, event, cond_dim, dtype = draw(LEADS), draw(EVENTS), draw(st.integers(0, 2)), draw(st.sampled_from(DTYPES))
    given = {"velocity": velocity(draw, event, cond_dim, dtype), "x0": tensor(draw, (*lead, *event), dtype)}
    return given | {"cond": condition(draw, lead, cond_dim, dtype)} | precision(draw, dtype) | of_event(event)


@st.composite
def integrate_flow_groups(draw: Draw) -> Arguments:
    event, cond_dim, dtype = draw(EVENTS), draw(st.integers(0, 2)), draw(st.sampled_from(DTYPES))
    leads = draw(st.lists(LEADS, max_size=3))
    given = {"velocity": velocity(draw, event, cond_dim, dtype)} | of_event(event)
    given["x0s"] = f"[{', '.join(tensor(draw, (*lead, *event), dtype) for lead in leads)}]"
    given["conds"] = f"[{', '.join(condition(draw, lead, cond_dim, dtype) for lead in leads)}]"
    return given | precision(draw, dtype) | clips(draw, some(draw, **SOLVER, differentiable=["True"]))


@st.composite
def flow_fisher_penalty(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    rows = (*lead, k, *event)
    given = states(draw, lead, event, dtype) | {"num_samples": str(k)}
    given |= draw(st.sampled_from([{}, {"noise": tensor(draw, rows, dtype)}, {"samples": tensor(draw, rows, dtype)}]))
    given |= draw(st.sampled_from([{}, {"bridge_noise": tensor(draw, rows, dtype)}]))
    given |= draw(st.sampled_from([{"generator": "torch.Generator()"}, {"seed": "3"}, {"seed": "torch.tensor(3)"}]))
    given |= draw(st.sampled_from([{}, {"t": "None"}, {"t": times(draw, (*lead, k, *ones(event)), dtype)}]))
    given |= precision(draw, dtype) | clips(draw, some(draw, **SOLVER)) | some(draw, **PENALTY)
    if given.get("path", PATHS[0]) == PATHS[0]:
        given |= some(draw, convention=["'exact'", "'velocity'"])
    return given | some(draw, min_sigma=["1e-6"], return_score=["True", "False"])


def states(draw: Draw, lead: tuple[int, ...], event: tuple[int, ...], dtype: str) -> Arguments:
    """A velocity, and states with a displacement for each."""
    cond_dim = draw(st.integers(0, 2))
    given = {"velocity": velocity(draw, event, cond_dim, dtype)}
    given |= {"cond": tensor(draw, (*lead, cond_dim), dtype) if cond_dim else "None"}
    return given | {"displacement": tensor(draw, (*lead, *event), dtype)} | of_event(event)


@st.composite
def flow_jacobian(draw: Draw) -> Arguments:
    return flow(draw) | some(draw, **{name: texts for name, texts in SOLVER.items() if name != "implementation"})


@st.composite
def pullback_penalty(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    given = {"displacement": tensor(draw, (*lead, *event), dtype)} | of_event(event)
    given |= {"jacobian": tensor(draw, (*lead, k, *event, *event), dtype)}
    return given | some(draw, **{name: texts for name, texts in PENALTY.items() if name != "backend"})


@st.composite
def flow_pullback_penalty(draw: Draw) -> Arguments:
    lead, k, event, dtype = draw(LEADS), draw(SIZES), draw(EVENTS), draw(st.sampled_from(DTYPES))
    given = states(draw, lead, event, dtype) | {"action": tensor(draw, (*lead, *event), dtype), "num_samples": str(k)}
    given |= draw(st.sampled_from([{}, {"bridge_noise": tensor(draw, (*lead, k, *event), dtype)}]))
    given |= draw(st.sampled_from([{"generator": "torch.Generator()"}, {"seed": "3"}, {"seed": "torch.tensor(3)"}]))
    given |= some(draw, **{name: SOLVER[name] for name in ("path", "num_steps", "method")}, **PENALTY)
    noise_at = "1" if given.get("path") == "'linear_reversed'" else "0"
    given |= draw(st.sampled_from([{}, {"t": draw(st.sampled_from([*TIMES, noise_at, "None"]))}]))
    return given | precision(draw, dtype) | some(draw, return_jacobian=["True", "False"])


@st.composite
def velocity_mlp(draw: Draw) -> Arguments:
    return {"cond_dim": draw(st.sampled_from(["0", "2"])), "action_dim": "2"} | stack(draw)


@st.composite
def build_mlp(draw: Draw) -> Arguments:
    return {"inputs": "3", "hidden": "(5,)", "outputs": "2"} | stack(draw)


def stack(draw: Draw) -> Arguments:
    return some(
        draw,
        hidden=["()", "[5]", "(4, np.int64(3))", "range(2, 4)"],
        activation=[repr(name) for name in fdkernels.networks.ACTIVATIONS],
        layer_norm=["True", "False"],
        layer_norm_eps=["0", "1e-5", "np.float32(1e-3)"],
    )


MODULES = [
    "nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))",
    "nn.Sequential(nn.Linear(5, 4), nn.GELU(approximate='tanh'), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))",
    "nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.SiLU()), nn.Identity(), nn.Linear(4, 2))",
    "nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))",
    "nn.Linear(5, 2)",
    "network(2, 2).net",
]
ODD_MODULES = [
    "nn.Module()", "nn.Sequential()", "nn.ModuleList([nn.Linear(5, 2)])", "nn.ModuleDict({'a': nn.Linear(5, 2)})",
    "nn.Linear(5, 0)", "nn.Linear(0, 2)", "nn.Linear(3, 2)", "nn.Linear(2, 2)", "nn.LazyLinear(2)",
    "nn.Linear(5, 2, dtype=torch.complex64)", "nn.Linear(5, 2, device='meta')", "nn.Bilinear(2, 2, 2)",
    "nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2, dtype=torch.float64))",
    "nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2, device='meta'))",
    "nn.Sequential(nn.Linear(5, 4), nn.Linear(3, 2))",
    "nn.Sequential(nn.Linear(5, 4), nn.LayerNorm((2, 2)), nn.Linear(4, 2))",
    "nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 2))",
    "nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 2))",
    "nn.utils.parametrizations.weight_norm(nn.Linear(5, 2))", "itself()", "filled(nn.Linear(5, 2), nan)",
    "filled(nn.Linear(5, 2), inf)", "nn.GRUCell(5, 2)", "nn.MultiheadAttention(2, 1)", "nn.LayerNorm(5)",
    "Answers(nn.Linear(5, 2), None)", "Answers(nn.Linear(5, 2), torch.ones(1))",
    "torch.jit.trace(nn.Linear(5, 2), torch.ones(1, 5))",
    "Answers(nn.Linear(5, 2), 3.0)", "len", "nn.Linear", "torch.compile(nn.Linear(5, 2), backend='eager')",
]  # fmt: skip
ORDERS = ["('cond', 'x', 't')", "['x', 't', 'cond']", "('t', 'cond', 'x')"]
ODD_ORDERS = [
    "('x', 't')", "('x',)", "('x', 'x', 't')", "('cond', 'x', 't', 't')", "'xt'", "('x', 't', None)",
    "(Lying(), 't', 'cond')", "(Raising(), 't', 'cond')", "{'x', 't', 'cond'}", "[['x'], 't', 'cond']",
    "('X', 'T', 'COND')",
]  # fmt: skip


@st.composite
def pack_mlp(draw: Draw) -> Arguments:
    dtype = draw(st.sampled_from(["", ".double()", ".bfloat16()", ".half()"]))
    return {"module": draw(st.sampled_from(MODULES)) + dtype, "order": draw(st.sampled_from(ORDERS))}


@st.composite
def normal(draw: Draw) -> Arguments:
    seed = draw(st.sampled_from(["0", "-5", "2**63", "torch.tensor(7)", "torch.tensor(3, dtype=torch.uint8)"]))
    shape = draw(st.sampled_from(["()", "(3,)", "[2, 3]", "(0, 2)", "torch.Size([4])", "(np.int64(2),)"]))
    device = draw(st.sampled_from(["'cpu'", "torch.device('cpu')"]))
    dtype = draw(st.sampled_from(["torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"]))
    first = some(draw, first=["0", "7", "2**31 - 1", "2**40", "np.int64(3)"])
    return {"seed": seed, "shape": shape, "device": device, "dtype": dtype} | first


ODD_SHAPES = [
    "(2**31, 2)", "(2**40,)", "(2**62, 0)", "(2**63,)", "(2**70, 0)", "(10**400,)", "(-1,)", "(2, -1)", "(2, 0.5)",
    "(None,)", "('2',)", "(True,)", "3", "'3'", "b'ab'", "Endless()", "(Raising(),)", "torch.tensor([2, 3])",
    "(torch.tensor(2),)", "np.array([2, 3])", "[[2]]", "(1,) * 1000", "range(3)",
]  # fmt: skip
ODD_HIDDEN = [
    "(0,)", "(-1,)", "(2.0,)", "(None,)", "('2',)", "(True,)", "(2**16 + 1,)", "(2**16,) * 9", "(10**400,)", "4",
    "(2,) * 100_000", "Endless()", "b'ab'", "'45'", "{4}", "[[4]]", "(Raising(),)", "(torch.tensor(4),)",
    "np.array([4])", "(np.uint8(200), np.uint8(100))", "(nan,)",
]  # fmt: skip
ODD_COUNTS = ["np.uint8(255)", "np.int8(127)", "2**16 + 1", "2**70", "10**5000", "2.0", "-1", "np.float64(2)"]


# -- a few calls whose arguments are replaced one by one ---------------------------------------------------------------

_ONE, _MANY, _MORE, _COND, _HALF, _TIMES, _SQUARES = (
    f"tensor({shape}, {dtype!r}, {how!r}, {seed})"
    for seed, (shape, dtype, how) in enumerate(
        [
            ((2, 3), "float32", "grad"),
            ((2, 4, 3), "float32", ""),
            ((2, 4, 3), "float32", ""),
            ((2, 2), "float32", ""),
            ((2, 2), "float16", ""),
            ((2, 4, 1), "float32", ""),
            ((2, 4, 3, 3), "float32", "grad"),
        ]
    )
)
_TIMES = f"torch.sigmoid({_TIMES})"
_CHAIN = {"velocity": "network(3, 2)", "cond": _COND, "displacement": _ONE}
_CHUNKS = {
    "velocity": "chunk_field",
    "cond": "tensor((2,), 'float32')",
    "event_dim": "2",
}  # the displacement is one chunk
_PULLED = _CHAIN | {"action": f"({_ONE}) / 2"}
EXAMPLES: dict[str, list[Arguments]] = {
    "fisher_penalty": [{"displacement": _ONE, "score": _MANY}],
    "velocity_to_score": [{"velocity": _MANY, "x": _MORE, "t": t} for t in ("0.5", _TIMES)],
    "velocity_fisher_penalty": [{"displacement": _ONE, "velocity": _MANY, "x": _MORE, "t": t} for t in ("0.5", _TIMES)],
    "fisher_spectrum": [{"score": _MANY}],
    "integrate_flow": [
        {"velocity": "network(3, 2)", "x0": _ONE, "cond": _COND},
        {"velocity": "field", "x0": _ONE, "cond": _COND, "return_path": "True"},
        {"velocity": "field", "x0": _HALF, "differentiable": "True"},
        {"velocity": "network(3, 0)", "x0": _ONE, "path": "'linear_reversed'"},
        {"velocity": "network(6, 2)", "x0": _ONE, "cond": "tensor((2,), 'float32')", "event_dim": "2"},
    ],
    "integrate_flow_groups": [
        {"velocity": "network(3, 2)", "x0s": f"[{_ONE}, {_MANY}]", "conds": f"[{_COND}, {_COND}.unsqueeze(1)]"},
        {"velocity": "field", "x0s": f"[{_ONE}, {_MANY}]", "conds": f"[{_COND}, None]"},
    ],
    "flow_fisher_penalty": [
        _CHAIN | {"seed": "3", "return_score": "True"},
        _CHAIN | {"velocity": "field", "noise": _MANY, "bridge_noise": _MORE, "path": "'linear_reversed'"},
        _CHAIN | {"samples": _MANY, "seed": "torch.tensor(3)", "t": _TIMES, "path": "'cosine'"},
        _CHAIN | _CHUNKS | {"seed": "3", "return_score": "True"},
    ],
    "flow_jacobian": [
        {"velocity": "network(3, 2)", "x0": _ONE, "cond": _COND},
        {"velocity": "field", "x0": _ONE, "cond": _COND, "method": "'rk4'"},
        {"velocity": "field", "x0": _HALF},
    ],
    "pullback_penalty": [{"displacement": _ONE, "jacobian": _SQUARES}],
    "flow_pullback_penalty": [
        _PULLED | {"seed": "3", "return_jacobian": "True"},
        _PULLED | {"velocity": "field", "bridge_noise": _MANY, "t": "0.5", "path": "'vp'"},
        _PULLED | _CHUNKS | {"bridge_noise": _MANY.replace("2, 4", "4, 2")},
    ],
    "VelocityMLP": [{"cond_dim": "2", "action_dim": "2"}],
    "build_mlp": [{"inputs": "3", "hidden": "(4,)", "outputs": "2", "layer_norm": "True"}],
    "pack_mlp": [{"module": MODULES[0], "order": ORDERS[0]}],
    "philox_normal": [{"seed": "3", "shape": "(2,)", "device": "'cpu'", "dtype": "torch.float32"}],
}


# -- references ------------------------------------------------------------------------------------------------------


def plain(value: Any, dtype: torch.dtype) -> Any:
    """The value as the reference takes it."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.dtype.is_floating_point else value
    if isinstance(value, PackedMLP):
        value = copy.deepcopy(value)
        for layer in value.layers:
            for module in (layer.linear, layer.norm_before, layer.norm_after):
                if module is not None:
                    module.to(dtype)
        return value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)
    if is_number(value):
        return int(value) if is_integer(value) else float(value)
    if isinstance(value, list | tuple):
        return [plain(item, dtype) for item in value]
    return value


def nudged(value: Any, off: float, generator: torch.Generator) -> Any:
    """The value, or the list of values, with each number larger or smaller by that part of it."""
    if isinstance(value, list):
        return [nudged(item, off, generator) for item in value]
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.is_nested:
        return value
    return value * (1 + off * torch.randn(value.shape, generator=generator, dtype=torch.float64).sign())


def within(t: Any) -> Any:
    """A tensor of times outside of [0, 1] gives NaN."""
    return torch.where((t >= 0) & (t <= 1), t, torch.nan) if isinstance(t, Tensor) else t


def of_chunks(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of flattened actions, for actions of any number of dimensions."""

    def judged(**given: Any) -> Any:
        n = given.pop("event_dim", 1)
        like = next(given[name] for name in ("displacement", "score", "x0", "x0s") if name in given)
        like = like[0] if isinstance(like, list) and like else like
        if n == 1 or not isinstance(like, Tensor):
            return reference(**given)
        event = like.shape[-n:]
        d = math.prod(event)
        for name, value in given.items():
            if name in ("displacement", "action", "score", "x", "x0", "noise", "bridge_noise", "samples", "velocity"):
                given[name] = value.reshape(*value.shape[:-n], d) if isinstance(value, Tensor) else value
            if name == "jacobian":
                given[name] = value.reshape(*value.shape[: -2 * n], d, d)
            if name == "x0s":
                given[name] = [x0.reshape(*x0.shape[:-n], d) for x0 in value]
            if name == "t" and isinstance(value, Tensor) and value.ndim >= n:
                given[name] = value.reshape(value.shape[: 1 - n])
        if given.get("velocity") is values.chunk_field:
            given["velocity"] = values.field  # of rows, it is the same
        out = reference(**given)
        whole = [out] if isinstance(out, Tensor) else list(out)
        shaped = [
            part.reshape(*part.shape[:-ends], *event * ends) if (ends := rows_at_the_end(i, given)) else part
            for i, part in enumerate(whole)
        ]
        return shaped[0] if isinstance(out, Tensor) else tuple(shaped)

    def rows_at_the_end(i: int, given: dict[str, Any]) -> int:
        """How many of an output's last dimensions are flattened events."""
        if reference in (flow_reference, groups_reference):
            return 1
        if reference is jacobian_reference:
            return i + 1
        return {chain_reference: 1, pullback_chain_reference: 2}.get(reference, 0) if i else 0

    return judged


def score_reference(velocity: Tensor, x: Tensor, t: Any, **options: Any) -> Tensor:
    options.pop("backend", None)
    out = fdkernels_ref.velocity_to_score(velocity, x, within(t), **options)
    return out.expand(velocity.shape)


def penalty_reference(displacement: Tensor, score: Tensor, **options: Any) -> Tensor:
    options.pop("backend", None)
    return fdkernels_ref.fisher_penalty(displacement, score, **options)


def velocity_penalty_reference(displacement: Tensor, velocity: Tensor, x: Tensor, t: Any, **options: Any) -> Tensor:
    of_score = {name: options.pop(name) for name in ("path", "convention", "min_sigma") if name in options}
    return penalty_reference(displacement, score_reference(velocity, x, t, **of_score), **options)


def spectrum_reference(score: Tensor, **options: Any) -> Tensor:
    """A row with NaN or infinity is NaN, and the others are what they are."""
    low = score.dtype in (torch.bfloat16, torch.float16)
    score = score.float() if low else score
    bad = ~fdkernels_ref.fisher_matrix(score).isfinite().all(-1).all(-1)
    out = fdkernels_ref.fisher_spectrum(torch.where(bad[..., None, None], 0, score), **options)
    return torch.where(bad[..., None], torch.nan, out)


def flow_reference(velocity: Any, x0: Tensor, cond: Tensor | None = None, **options: Any) -> Tensor:
    for name in ("backend", "implementation", "precision", "differentiable"):
        options.pop(name, None)
    spread = cond if cond is None else cond.expand(*x0.shape[:-1], cond.shape[-1])

    def as_ours(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return velocity(x, t, cond).to(x.dtype)

    return fdkernels_ref.integrate_flow(as_ours, x0, spread, **options)


def groups_reference(velocity: Any, x0s: list[Tensor], conds: list[Tensor | None], **options: Any) -> Any:
    return tuple(flow_reference(velocity, x0, cond, **options) for x0, cond in zip(x0s, conds, strict=True))


DAMPING = inspect.signature(fdkernels.pullback_penalty).parameters["damping"].default
GLOBAL_SEED = 0
"""Of PyTorch's own generator before every call."""


def chain_reference(velocity: Any, cond: Tensor, displacement: Tensor, **options: Any) -> Any:
    """Noise that is drawn is drawn as documented; ``drawn`` is the dtype in which it is."""
    cond = displacement.new_empty(*displacement.shape[:-1], 0) if cond is None else cond
    drawn, noises = options.pop("drawn"), {name: options.get(name) for name in ("noise", "bridge_noise", "samples")}
    for name in ("backend", "implementation", "precision"):
        options.pop(name, None)
    seed, generator, samples = options.pop("seed", None), options.pop("generator", None), options.pop("samples", None)
    counts = [noise.shape[-2] for noise in noises.values() if noise is not None]
    options["num_samples"] = k = counts[0] if counts else options.get("num_samples", 4)
    shape = (*displacement.shape[:-1], k, displacement.shape[-1])
    drawn_from = GLOBAL_SEED if generator is None else generator.initial_seed()
    generator = torch.Generator().manual_seed(drawn_from)
    for i, name in enumerate(("noise", "bridge_noise")):
        if noises[name] is not None or (name == "noise" and samples is not None):
            continue
        if seed is not None:
            noise = philox_normal(seed, shape, "cpu", drawn, first=i * math.prod(shape))
        else:
            noise = torch.randn(shape, generator=generator, dtype=drawn, device="cpu")
        options[name] = noise.to(displacement.dtype)
    t = within(options.pop("t", None))
    if samples is not None:  # nothing is integrated
        for name in ("num_steps", "method", "clip", "clip_each_step"):
            options.pop(name, None)
        stays = {"time_grid": [0.0, 0.0], "noise": samples, "clip": None}
        return fdkernels_ref.flow_fisher_penalty(velocity, cond, displacement, t=t, **options | stays)
    return fdkernels_ref.flow_fisher_penalty(velocity, cond, displacement, t=t, **options)


def jacobian_reference(velocity: Any, x0: Tensor, cond: Tensor | None = None, **options: Any) -> Any:
    for name in ("backend", "precision"):
        options.pop(name, None)
    spread = cond if cond is None else cond.expand(*x0.shape[:-1], cond.shape[-1])
    return fdkernels_ref.flow_jacobian(lambda x, t, c: velocity(x, t, c).to(x.dtype), x0, spread, **options)


def pullback_reference(displacement: Tensor, jacobian: Tensor, doubt: bool = False, **options: Any) -> Tensor:
    """Computed in float64, as ours. A row whose covariance is not finite or has no inverse is NaN.

    With ``doubt``, so is one where rounding decides whether it has, and others are off by what rounding may do to an
    inverse. A Jacobian that is off shows less: if its columns are equal, so are theirs, and the covariance keeps its
    rank.
    """
    reduction, d = options.pop("reduction", "none"), jacobian.shape[-1]
    wide, identity = jacobian.double(), torch.eye(d, dtype=torch.float64, device="cpu")
    covariance = wide @ wide.mT + options.get("damping", DAMPING) * identity
    root, failed = torch.linalg.cholesky_ex(covariance)
    bad = ~covariance.isfinite().all(-1).all(-1) | (failed != 0)
    pivots, variances = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (root, covariance))
    doubtful = bad | (pivots.square() < 1e-10 * variances).any(-1)
    sound = torch.where(doubtful[..., None, None], identity, wide)
    out = fdkernels_ref.pullback_penalty(displacement.double(), sound, **options)
    if doubt:
        bad = doubtful
        condition = torch.linalg.cond(torch.where(doubtful[..., None, None], identity, covariance)).amax(-1)
        out = out * (1 + torch.finfo(torch.float64).eps * condition)
    out = torch.where(bad.any(-1), torch.nan, out)
    out = out if reduction == "none" else out.mean() if reduction == "mean" else out.sum()
    return out.to(torch.promote_types(torch.promote_types(displacement.dtype, jacobian.dtype), torch.float32))


def pullback_chain_reference(velocity: Any, cond: Tensor, action: Tensor, displacement: Tensor, **options: Any) -> Any:
    """Noise that is drawn is drawn as documented; ``drawn`` is the dtype in which it is."""
    cond = displacement.new_empty(*displacement.shape[:-1], 0) if cond is None else cond
    drawn, bridge = options.pop("drawn"), options.pop("bridge_noise", None)
    seed, generator = options.pop("seed", None), options.pop("generator", None)
    k = options.pop("num_samples", 2)  # ignored where noise is given
    if bridge is None:
        shape = (*displacement.shape[:-1], k, displacement.shape[-1])
        generator = torch.Generator().manual_seed(GLOBAL_SEED if generator is None else generator.initial_seed())
        bridge = torch.randn(shape, generator=generator, dtype=drawn, device="cpu")
        if seed is not None:
            bridge = philox_normal(seed, shape, "cpu", drawn)
    path = path_of(options.pop("path", "linear"))
    end = data_time(path)
    t, steps = options.pop("t", None), options.pop("num_steps", 2)
    t = abs(end - 0.2) if t is None else t
    at = torch.tensor(t, dtype=torch.float64, device="cpu")
    alpha, sigma = path.alpha(at), path.sigma(at)
    view = sigma * bridge.to(action.dtype) + alpha * action.unsqueeze(-2)
    rows = cond.unsqueeze(-2).expand(*view.shape[:-1], cond.shape[-1])
    of_flow = {"method": options.pop("method", "euler"), "time_grid": [t + (end - t) * i / steps for i in range(steps)]}
    of_flow["time_grid"].append(end)
    jacobian = sigma * jacobian_reference(velocity, view, rows, **of_flow)[1]
    wanted = options.pop("return_jacobian", False)
    for name in ("backend", "precision"):
        options.pop(name, None)
    penalty = pullback_reference(displacement, jacobian, **options)
    return (penalty, jacobian) if wanted else penalty


def normal_reference(seed: int | Tensor, shape: Any, dtype: torch.dtype, first: int = 0, **_: Any) -> Tensor:
    shape = tuple(int(size) for size in shape)
    seed = int(seed)
    position = torch.arange(first, first + math.prod(shape), device="cpu")
    words = philox(
        (position & 0xFFFFFFFF, position >> 32, 0 * position, 0 * position),
        (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF),
    )
    radius, angle = (_uniform(word).double() for word in words[:2])
    return (torch.sqrt(-2 * torch.log(radius.clamp(min=1e-7))) * torch.cos(2 * math.pi * angle)).view(shape)


def packed_reference(module: Any, order: Any = ("cond", "x", "t")) -> Any:
    """The module, as it answers to (x, t, cond)."""
    if isinstance(module, fdkernels.VelocityMLP):
        return module

    def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        inputs = {"x": x, "t": t, "cond": cond}
        return module(torch.cat([inputs[str(name)] for name in order], -1))

    return velocity


TENSORS = {name: [] for name in ("displacement", "score", "x", "x0", "cond", "noise", "bridge_noise", "samples")}
TENSORS |= {"jacobian": [], "action": [], "event_dim": ODD_COUNTS}
OF_SOLVER = {"velocity": values.ODD_FIELDS, "num_steps": ODD_COUNTS, "path": values.PATHS}
OF_STACK = {"hidden": ODD_HIDDEN, "cond_dim": ODD_COUNTS, "action_dim": ODD_COUNTS, "inputs": ODD_COUNTS}
PUBLIC = [
    Public("fisher_penalty", fdkernels.fisher_penalty, fisher_penalty(), of_chunks(penalty_reference), TENSORS),
    Public(
        "velocity_to_score", fdkernels.velocity_to_score, velocity_to_score(), score_reference,
        TENSORS | {"velocity": [], "path": values.PATHS},
    ),
    Public(
        "velocity_fisher_penalty", fdkernels.velocity_fisher_penalty, velocity_fisher_penalty(),
        of_chunks(velocity_penalty_reference), TENSORS | {"velocity": [], "path": values.PATHS},
    ),
    Public("fisher_spectrum", fdkernels.fisher_spectrum, fisher_spectrum(), of_chunks(spectrum_reference), TENSORS),
    Public(
        "integrate_flow", fdkernels.integrate_flow, integrate_flow(), of_chunks(flow_reference), TENSORS | OF_SOLVER
    ),
    Public(
        "integrate_flow_groups", fdkernels.integrate_flow_groups, integrate_flow_groups(), of_chunks(groups_reference),
        TENSORS | OF_SOLVER,
    ),
    Public(
        "flow_fisher_penalty", fdkernels.flow_fisher_penalty, flow_fisher_penalty(), of_chunks(chain_reference),
        TENSORS | OF_SOLVER,
    ),
    Public(
        "flow_jacobian", fdkernels.flow_jacobian, flow_jacobian(), of_chunks(jacobian_reference), TENSORS | OF_SOLVER
    ),
    Public("pullback_penalty", fdkernels.pullback_penalty, pullback_penalty(), of_chunks(pullback_reference), TENSORS),
    Public(
        "flow_pullback_penalty", fdkernels.flow_pullback_penalty, flow_pullback_penalty(),
        of_chunks(pullback_chain_reference), TENSORS | OF_SOLVER,
    ),
    Public("VelocityMLP", fdkernels.VelocityMLP, velocity_mlp(), lambda **_: None, OF_STACK),
    Public("build_mlp", fdkernels.build_mlp, build_mlp(), lambda **_: None, OF_STACK | {"outputs": ODD_COUNTS}),
    Public(
        "pack_mlp", fdkernels.pack_mlp, pack_mlp(), packed_reference, {"module": ODD_MODULES, "order": ODD_ORDERS}
    ),
    Public("philox_normal", philox_normal, normal(), normal_reference, {"shape": ODD_SHAPES}),
]  # fmt: skip
