"""``python -m fdkernels.info``: what it says about this machine, and about others."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import collect_env

import fdkernels
from fdkernels import backend, info
from fdkernels.cpu import processor
from fdkernels.kernels.tuning import table
from fdkernels.kernels.tuning.table import Gpu

GPUS = [Gpu("NVIDIA H200", "sm_90"), Gpu("NVIDIA L4", "sm_89"), Gpu("NVIDIA A100", "sm_80")]


def lines_of(text: str, name: str) -> list[list[str]]:
    return [line.split(maxsplit=1) for line in text.splitlines() if line.split()[0] == name]


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = subprocess.run([sys.executable, "-m", "fdkernels.info"], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    said = dict(line.split(maxsplit=1) for line in run.stdout.splitlines() if line[0] != " ")
    assert said["fdkernels"] == fdkernels.__version__
    assert said["torch"] == importlib.metadata.version("torch")
    assert said["CUDA_VISIBLE_DEVICES"] == "''"
    assert said["CPU"].endswith("1 threads")
    assert said["GPU"] == "none that PyTorch can use"


def test_it_adds_what_pytorch_collects(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "OS: an operating system")
    info.main(["--torch"])
    assert capsys.readouterr().out == f"{info.report()}\n\nOS: an operating system\n"


@pytest.mark.parametrize("units", [True, False])
def test_it_says_what_the_processor_gets(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(processor, "multiplies", lambda dtype: units)
    monkeypatch.setattr(processor, "onednn_multiplies", lambda: units)
    assert ("hardware units" in info.report()) == units
    assert ("oneDNN" in info.report()) == units


@pytest.mark.parametrize("installed", [True, False])
def test_gpus(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(table, "gpu_of", lambda device: GPUS[device.index])
    monkeypatch.setattr(table, "TABLE", {"NVIDIA H200": {}, "sm_90": {}, "sm_80": {}})
    monkeypatch.setattr(backend, "_HAS_TRITON", installed)
    with FakeTensorMode():  # CUDA tensors without CUDA
        text = info.report()
    for gpu in GPUS:
        assert f"{gpu.name}, {gpu.family}" in text
    operators = "Triton" if installed else "PyTorch, because triton is not installed"
    assert [value for _, value in lines_of(text, "operators")][1:] == [operators] * 3
    tiles = [value for _, value in lines_of(text, "tiles")]
    assert tiles[0].startswith("measured on this GPU")
    assert tiles[1].startswith("heuristics")
    assert tiles[2].startswith("shipped for sm_80")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package",))
    assert lines_of(info.report(), "no-such-package") == [["no-such-package", "not installed"]]
