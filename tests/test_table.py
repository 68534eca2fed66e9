"""The table of configurations: a GPU's own entries go before its family's, and measured ones are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fdkernels.kernels.tuning import table
from fdkernels.kernels.tuning.table import Gpu

H100, A100 = Gpu("NVIDIA H100", "sm_90"), Gpu("NVIDIA A100", "sm_80")


def entry(rows: int, source: str, precision: str = "half") -> dict:
    return {"precision": precision, "problem_rows": rows, "width": 512, "source": source}


def test_a_gpus_own_entries_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = {"sm_90": {"flow": [entry(256, "family"), entry(9, "family", "high")]}}, entry(1024, "own")
    monkeypatch.setattr(table, "TABLE", shipped | {"NVIDIA H100": {"flow": [own]}})

    def found(gpu: Gpu, precision: str) -> str | None:
        serves = lambda entry: entry["precision"] == precision  # noqa: E731
        best = table.nearest(gpu, "flow", lambda entry: abs(entry["problem_rows"] - 256), serves)
        return best and best["source"]

    assert found(H100, "half") == "own"
    assert found(H100, "high") == "family"  # its own entries lack this precision
    assert found(Gpu("NVIDIA H200", "sm_90"), "half") == "family"
    assert found(A100, "half") is None


def test_written_entries_replace_those_for_the_same_problem(tmp_path: Path) -> None:
    file = tmp_path / "new" / "configs.json"
    table.write(file, H100.name, {"flow": [entry(256, "first"), entry(512, "first")], "score": [{"row_bytes": 1}]})
    table.write(file, H100.name, {"flow": [entry(256, "second")]})
    table.write(file, A100.name, {"flow": [entry(256, "other GPU")]})
    read = table.read(file)
    assert [e["source"] for e in read[H100.name]["flow"]] == ["first", "second"]
    assert [e["problem_rows"] for e in read[H100.name]["flow"]] == [512, 256]
    assert read[H100.name]["score"] == [{"row_bytes": 1}]
    assert [e["source"] for e in read[A100.name]["flow"]] == ["other GPU"]
    assert list(file.parent.iterdir()) == [file]


def test_where_the_users_table_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FDKERNELS_CONFIGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.user_file() == tmp_path / "fdkernels" / "configs.json"
    monkeypatch.setenv("FDKERNELS_CONFIGS", str(tmp_path / "mine.json"))
    assert table.user_file() == tmp_path / "mine.json"
    assert table.read(tmp_path / "mine.json") == {}


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "configs.json"
    for content in ('{"sm_90": ', "[]"):
        file.write_text(content)
        with pytest.raises(RuntimeError, match=r"configs\.json is no table of fdkernels .*: delete it"):
            table.read(file)


def test_no_place_for_a_table_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.read(tmp_path) == {}  # a folder
    assert table.read(Path("/dev/null/configs.json")) == {}
    monkeypatch.delenv("FDKERNELS_CONFIGS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert table.read(table.user_file()) == {}


def test_every_shipped_entry_says_what_it_rests_on() -> None:
    for kernels in json.loads(table.SHIPPED_FILE.read_text()).values():
        for entries in kernels.values():
            problems = [[e.get(field) for field in table.PROBLEM] for e in entries]
            assert all(e["source"] for e in entries)
            assert all(problems.count(problem) == 1 for problem in problems)
