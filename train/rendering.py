"""MuJoCo's rendering without a screen."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

import mujoco


def render_off_screen() -> None:
    """Let MuJoCo render without a screen, unless there is one or ``MUJOCO_GL`` names another way."""
    with contextlib.suppress(ImportError):
        # Mesa, which renders without a graphics card, and Triton each bring an LLVM. Triton's must be loaded first: a
        # process that renders and then updates an agent, for which PyTorch imports Triton, would crash.
        importlib.import_module("triton")
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("MUJOCO_GL"):
        return
    os.environ["MUJOCO_GL"] = "egl"
    # MuJoCo's own renderer has chosen its way when it was imported; Gymnasium's chooses later.
    importlib.reload(sys.modules[mujoco.Renderer.__module__].gl_context)
