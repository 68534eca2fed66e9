"""What Triton 3.3 lacks, the oldest that is supported, and what takes its place there."""

import triton
import triton.language as tl

OLDEST = triton.__version__.startswith("3.3.")

GATHERS = tl.constexpr(not OLDEST)
"""Whether a gather within a long run compiles: Triton 3.3 fails on it by an assertion of its own.

Instead: rows of a size that no vector divides are read number by number.
"""

if not hasattr(tl.constexpr, "__getitem__"):  # elements of a constant tuple, as every newer Triton has them
    tl.constexpr.__getitem__ = lambda self, index: self.value[getattr(index, "value", index)]

if OLDEST:  # fields of a constant record, likewise

    def _field(self, name):
        if not hasattr(type(self.__dict__.get("value")), "_fields"):
            raise AttributeError(f"'constexpr' object has no attribute {name!r}")
        return tl.constexpr(getattr(self.value, name))

    tl.constexpr.__getattr__ = _field
