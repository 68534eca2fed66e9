"""Triton's interpreter with all programs of a launch running at once, a thread each, not one after another.

Otherwise programs that wait for one another would never end. Their turns are shuffled, so that a program that does not
wait long enough reads data that are not written yet.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

LONGEST = 60.0  # seconds that a launch may take, so that endless waiting fails the test instead of hanging it


@contextlib.contextmanager
def programs_together(seed: int = 0, pause: float = 0.0) -> Iterator[None]:
    """``pause`` is the longest a program sleeps, at random, before it reads or writes."""
    from triton.runtime import interpreter

    chance = random.Random(seed)
    own = threading.local()
    stop = threading.Event()
    builder = interpreter.InterpreterBuilder
    rewrite, one_by_one = interpreter.InterpretedFunction.rewrite, threading.Lock()
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def program_id(self: Any, axis: int) -> Any:
        index = own.index[axis] if hasattr(own, "index") else self.grid_idx[axis]
        return interpreter.TensorHandle(interpreter.np.array([index], dtype=interpreter.np.int32), interpreter.tl.int32)

    def rewrite_alone(self: Any) -> Any:
        # Python 3.11's parser has one depth counter for all threads, and a callback of the garbage collector
        # (Hypothesis has one) lets another thread in
        with one_by_one:
            return rewrite(self)

    def slowly(access: Any, pause: float) -> Any:
        def paused(*args: Any) -> Any:
            if stop.is_set():
                raise TimeoutError("the launch took too long, or another program failed")
            if pause:
                time.sleep(chance.random() * pause)
            return access(*args)

        return paused

    def run_all(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name in inspect.getfullargspec(self.fn).args}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        scope = interpreter._patch_lang(self.fn)
        args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
        args = {name: a if name in self.constexprs else interpreter._implicit_cvt(a) for name, a in args.items()}
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        failures: list[BaseException] = []

        def run(index: tuple[int, ...]) -> None:
            own.index = index
            try:
                self.fn(**args)
            except BaseException as error:
                failures.append(error)
                stop.set()

        indices = list(itertools.product(*map(range, grid)))
        chance.shuffle(indices)
        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in indices]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        deadline = time.monotonic() + LONGEST
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if any(thread.is_alive() for thread in threads):
                stop.set()
                failures.append(TimeoutError(f"programs still wait for one another after {LONGEST:g} s"))
        finally:
            sys.setswitchinterval(interval)
            if scope is not None:  # Triton 3.6 and newer
                scope.restore()
        if failures:
            raise failures[0]
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", run_all),
        mock.patch.object(interpreter.InterpretedFunction, "rewrite", rewrite_alone),
        mock.patch.object(builder, "create_get_program_id", program_id),
        mock.patch.object(builder, "create_masked_load", slowly(load, pause)),
        mock.patch.object(builder, "create_masked_store", slowly(store, pause)),
        mock.patch.object(builder, "create_atomic_rmw", slowly(atomic, 5e-4)),
    ):
        yield
