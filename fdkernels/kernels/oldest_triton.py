"""Substitutes for features that Triton 3.3, the oldest supported version, lacks."""

import triton
import triton.language as tl

IS_OLDEST = triton.__version__.startswith("3.3.")

GATHERS = tl.constexpr(not IS_OLDEST)
"""Whether a gather within a long run compiles. In Triton 3.3 it fails an internal assertion.

Instead: rows whose size is not a multiple of the vector's are read one number at a time.
"""

if not hasattr(tl.constexpr, "__getitem__"):  # index a constant tuple, as every newer Triton can
    tl.constexpr.__getitem__ = lambda self, index: self.value[getattr(index, "value", index)]

if IS_OLDEST:  # likewise, read the fields of a constant record

    def _field(self, name):
        if not hasattr(type(self.__dict__.get("value")), "_fields"):
            raise AttributeError(f"'constexpr' object has no attribute {name!r}")
        return tl.constexpr(getattr(self.value, name))

    tl.constexpr.__getattr__ = _field
