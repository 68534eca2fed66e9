"""Whatever a public function is called with, it gives the reference's value or says which argument it cannot take.

A good call is drawn, and none, one or two of its arguments are replaced by odd values. Short in ``make test``, long in
``make fuzz``.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fdkernels.networks import PackedMLP
from tests.fuzz import calls, values
from tests.fuzz.calls import PUBLIC, Arguments, Public
from tests.judge import BARS, leaves

SECONDS = 60  # of a call that should return at once, also the first one, which may import a compiler
CONTEXTS = ["", "no_grad", "inference_mode", "autocast", "half", "medium", "high", "double", "meta"]
TENSORS = {"displacement", "score", "velocity", "x", "t", "cond", "x0", "noise", "bridge_noise", "samples"}
TENSORS |= {"x0s", "conds", "jacobian", "action", "event_dim"}
RELATED = [
    TENSORS,
    TENSORS | {"precision"},  # one that is less than their dtype
    {"path", "convention", "t", "time_grid"},
    {"clip", "clip_each_step"},
    {"num_samples", "noise", "bridge_noise", "samples", "t"},
    {"seed", "generator", "device"},
    {"backend", "implementation", "precision"},
    {"module", "order"},
    {"shape", "first"},
    {"inputs", "hidden", "outputs"},
    {"cond_dim", "hidden", "action_dim"},
]
"""Where one of them is odd, a message may name another."""
NOT_COMPARED = "too (big to convert|large for a float)|not on the expected device meta|the number of sizes provided"
"""Why the reference may not take a call that is right; in all other cases it judges.

The last is that of a condition with dimensions of its own, where a changed event_dim makes all rows one action.
"""


@st.composite
def odd_calls(draw: calls.Draw, public: Public) -> tuple[str, Arguments, tuple[str, ...]]:
    """A context, arguments, and which of them have been replaced."""
    arguments = draw(public.good)
    replaced = draw(st.lists(st.sampled_from(public.parameters()), max_size=2, unique=True))
    for name in replaced:
        kinds = [values.ODD, odd_of_its_kind(public, name, arguments.get(name, "None"))]
        arguments[name] = draw(st.sampled_from(draw(st.sampled_from([kind for kind in kinds if kind]))))
    # where float32 products are rough by a global setting, no call can have others
    contexts = [context for context in CONTEXTS if context != "medium" or "precision" not in arguments]
    return draw(st.sampled_from(contexts)), arguments, tuple(replaced)


LISTS = [
    "tuple({})",
    "({})[:1]",
    "({}) * 2",
    "[*{}, None]",
    "[*{}, torch.ones(2, 2)]",
    "[*{}, torch.ones(2, 2).double()]",
]
LISTS += [
    "[None] * len({})",
    "[torch.ones(()) for _ in {}]",
    "[torch.ones(1, 2).to('meta') for _ in {}]",
    "LyingList({})",
]
LISTS += ["[poke(torch.ones(1, 2), nan) for _ in {}]", "[torch.ones(3, 2, 0) for _ in {}]", "dict(enumerate({}))"]


def odd_of_its_kind(public: Public, name: str, text: str) -> list[str]:
    """What may take the place of the argument ``text`` and looks a little like it."""
    odd = list(public.odd.get(name, []))
    if text.startswith(("tensor", "torch.sigmoid")):
        odd += [turned.replace("{}", text) for turned in values.TURNED]
    if name in ("x0s", "conds"):
        odd += [turned.replace("{}", text) for turned in LISTS]
    return odd


each = pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)


@each
def test_one_odd_argument(public: Public) -> None:
    """Every argument of a few calls in turn, by everything that looks like it, and by some or all of the rest."""
    step = max(1, 500 // settings().max_examples)
    for example in calls.EXAMPLES[public.name]:
        for i, name in enumerate(public.parameters()):
            for text in (*odd_of_its_kind(public, name, example.get(name, "None")), *values.ODD[i % step :: step]):
                judge(public, "", example | {name: text}, (name,))


@each
def test_any_call(public: Public) -> None:
    @settings(max_examples=3 * settings().max_examples, suppress_health_check=list(HealthCheck))
    @given(odd_calls(public))
    def any_call(drawn: tuple[str, Arguments, tuple[str, ...]]) -> None:
        judge(public, *drawn)

    any_call()


def judge(public: Public, context: str, arguments: Arguments, replaced: tuple[str, ...]) -> None:
    call = f"{public.text(arguments)}  # replaced: {', '.join(replaced) or 'nothing'}; in: {context or 'nothing'}"
    try:
        with quietly():
            given = {name: eval(text, vars(values)) for name, text in arguments.items()}
    except Exception:  # not a value at all, such as a sparse tensor of that shape
        return
    try:
        with within(SECONDS, call), strictly(), CONTEXT[context]():
            torch.manual_seed(calls.GLOBAL_SEED)
            out = public.function(**given)
            differentiate(out, given)
    except Exception as error:
        if not refused(public, error, arguments, given, replaced):
            raise AssertionError(f"{call}\n{type(error).__name__}: {error}") from error
        return
    try:
        wanted = Wanted(public, given, context)
    except Exception as error:
        if not replaced or not re.search(NOT_COMPARED, str(error)):
            raise AssertionError(f"{call}\nthe reference does not take it: {error}") from error
        return
    with quietly():
        wanted.judge(out, call)


def refused(
    public: Public, error: Exception, arguments: Arguments, given: dict[str, Any], replaced: tuple[str, ...]
) -> bool:
    """Whether the error names a replaced argument, or was raised by a replaced argument itself."""
    texts = [arguments[name] for name in replaced]
    if isinstance(error, values.Own):
        return any("raising" in text for text in texts) or bool(TENSORS & set(replaced))
    if "velocity" in replaced and callable(given["velocity"]) and arguments["velocity"] in values.ODD:
        return True  # called, and not of a velocity's kind
    if not isinstance(error, TypeError | ValueError | RuntimeError) or not str(error).startswith(f"{public.name}: "):
        return False
    names = set(replaced).union(*(group for group in RELATED if group & set(replaced)))
    return any(re.search(rf"(?<!\w){name}(?!\w)", str(error)) for name in names)


@contextlib.contextmanager
def within(seconds: int, call: str) -> Iterator[None]:
    """Fail if the body takes longer, also if it never returns."""

    def stop(*_: object) -> None:
        pytest.fail(f"{call}\nstill running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    begin = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begin < seconds, f"{call}\ntook more than {seconds} s"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "In CPU autocast|.*is in beta|.*prototype stage|.*deprecated")
        warnings.simplefilter("ignore", ResourceWarning)  # of what an earlier test left to the garbage collector
        yield


@contextlib.contextmanager
def products(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXT: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "half": lambda: torch.autocast("cpu", torch.float16),
    "medium": lambda: products("medium"),
    "high": lambda: products("high"),
    "double": double,
    "meta": lambda: torch.device("meta"),
}


def tensors_in(given: dict[str, Any]) -> list[Tensor]:
    lists = [value if isinstance(value, list | tuple) else [value] for value in given.values()]
    return [value for values in lists for value in values if isinstance(value, Tensor)]


def differentiate(out: Any, given: dict[str, Any]) -> None:
    """Compute the gradients, where there are any."""
    wants = [tensor for tensor in tensors_in(given) if tensor.requires_grad]
    for tensor in leaves(out) if not isinstance(out, nn.Module | PackedMLP) else ():
        if wants and tensor.requires_grad:
            torch.autograd.grad(tensor.sum(), wants, allow_unused=True, retain_graph=True)


class Wanted:
    """What the reference makes of the same arguments: exactly, in their precision, and of arguments a little off."""

    def __init__(self, public: Public, given: dict[str, Any], context: str) -> None:
        floating = [tensor.dtype for tensor in tensors_in(given) if tensor.dtype in BARS]
        low = {"autocast": torch.bfloat16, "half": torch.float16}.get(context)
        if given.get("precision") == "bf16":
            low = torch.bfloat16
        self.given, self.public = given, public
        flows = "velocity" in given and not isinstance(given["velocity"], Tensor)
        dtypes = [*floating, low] if low is not None and flows else floating or [torch.float32]
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        with quietly(), torch.no_grad():
            self.truth = self.reference(torch.float64)
            self.near = self.reference(torch.float64, torch.finfo(self.dtype).eps)
            if isinstance(self.near, tuple) and public.name in ("flow_jacobian", "flow_pullback_penalty"):
                first, jacobian = self.near  # which a NaN fills sooner or later
                of_event = 2 * int(given.get("event_dim", 1))
                whole = jacobian.isfinite().flatten(-of_event).all(-1)
                self.near = first, torch.where(whole[(..., *(None,) * of_event)], jacobian, torch.nan)
            try:
                self.plain = self.reference(self.dtype)
            except Exception:
                self.plain = self.truth

    def reference(self, dtype: torch.dtype, off: float = 0.0) -> Any:
        given = {name: calls.plain(value, dtype) for name, value in self.given.items()}
        if "generator" in given and given["generator"] is not None:
            given["generator"] = self.given["generator"]
        if self.public.name in ("flow_fisher_penalty", "flow_pullback_penalty"):
            like = self.given["cond"]
            given["drawn"] = (like if isinstance(like, Tensor) else self.given["displacement"]).dtype
        if self.public.name in ("pullback_penalty", "flow_pullback_penalty"):
            given["doubt"] = off > 0
        if self.public.name == "philox_normal":
            self.dtype = max(given["dtype"], torch.float32, key=lambda dtype: torch.finfo(dtype).eps)  # made in float32
        if off:
            generator = torch.Generator().manual_seed(0)
            given = {name: calls.nudged(value, off, generator) for name, value in given.items()}
        return self.public.reference(**given)

    def judge(self, out: Any, call: str) -> None:
        name, given = self.public.name, self.given
        if name in ("VelocityMLP", "build_mlp"):
            return self.judge_module(out, call)
        if name == "pack_mlp":
            return self.judge_packed(out, call)
        for ours, truth, near, plain in zip(
            *map(leaves, map(listed, (out, self.truth, self.near, self.plain))), strict=True
        ):
            assert ours.shape == truth.shape, f"{call}\nshape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
            if ours.device.type != "meta":
                self.judge_tensor(ours, truth, near, plain, call)
        if name in ("fisher_penalty", "fisher_spectrum", "velocity_fisher_penalty", "pullback_penalty"):
            inputs = [tensor.dtype for key, tensor in given.items() if key != "t" and isinstance(tensor, Tensor)]
            wide = torch.float64 in inputs
            assert out.dtype == (torch.float64 if wide else torch.float32), f"{call}\n{out.dtype}"
        if name == "velocity_to_score":
            wanted = torch.promote_types(given["velocity"].dtype, given["x"].dtype)
            assert out.dtype == wanted, f"{call}\n{out.dtype}, wanted {wanted}"
        if name == "integrate_flow":
            assert out.dtype == given["x0"].dtype, f"{call}\n{out.dtype}"
        if name == "flow_jacobian":
            wide = torch.promote_types(given["x0"].dtype, torch.float32)
            assert (out[0].dtype, out[1].dtype) == (given["x0"].dtype, wide), call
        if name == "philox_normal":
            assert out.dtype == given["dtype"], f"{call}\n{out.dtype}"

    def judge_tensor(self, ours: Tensor, truth: Tensor, near: Tensor, plain: Tensor, call: str) -> None:
        ours, plain = ours.double(), plain.double()
        sound = truth.isfinite()
        assert not ours[~sound].isfinite().any(), f"{call}\n{ours}, wanted {truth}"
        sound &= plain.isfinite() & near.isfinite()  # the plain maths may overflow
        ours, truth, near, plain = (x[sound] for x in (ours, truth, near, plain))
        size = max(truth.norm().item(), truth.numel() ** 0.5 if self.public.name == "philox_normal" else 0.0)
        off = (ours - truth).norm().item()
        bar = max(
            BARS[self.dtype]["torch"] * size,
            2 * (plain - truth).norm().item(),
            32 * (near - truth).norm().item(),
            8 * torch.finfo(self.dtype).smallest_normal,
        )
        assert off <= 2 * bar, f"{call}\noff by {off:.2e} of {size:.2e}, above {2 * bar:.2e}: {ours}, wanted {truth}"

    def judge_module(self, out: nn.Module, call: str) -> None:
        given, like = self.given, next(out.parameters())
        rows = functools.partial(torch.ones, 2, dtype=like.dtype, device=like.device)
        with torch.inference_mode():
            if self.public.name == "VelocityMLP":
                d, cond_dim = int(given["action_dim"]), int(given["cond_dim"])
                velocity = out(rows(d), rows(1), rows(cond_dim) if cond_dim else None)
            else:
                d, velocity = int(given["outputs"]), out(rows(int(given["inputs"])))
        assert velocity.shape == (2, d), call

    def judge_packed(self, out: PackedMLP, call: str) -> None:
        dtype, d, cond_dim = out.dtype, out.action_dim, out.cond_dim
        rows = torch.ones(2, d, dtype=dtype), torch.ones(2, 1, dtype=dtype), torch.ones(2, cond_dim, dtype=dtype)
        module = self.given["module"]
        wanted = calls.packed_reference(module, self.given.get("order") or ("cond", "x", "t"))(*rows)
        torch.testing.assert_close(
            out(*rows), wanted, rtol=1e-2, atol=1e-3, equal_nan=True, msg=lambda m: f"{call}\n{m}"
        )


def listed(out: Any) -> Any:
    return [out] if isinstance(out, Tensor) or out is None else out
