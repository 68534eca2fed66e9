"""The floor plan: imports go one way, and options travel in records."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fdkernels").rglob("*.py"))
# From the bottom up. A module may import from its own floor and from floors below, never from above. A folder's name
# stands for all of its modules.
FLOORS = [
    {"torch_private", "validation", "dtypes"},
    {"backend", "philox", "noise", "groups", "events", "condition", "paths", "solvers"},
    {"cpu.processor", "cpu.layers"},
    {"activations"},
    {"layers"},
    {"cpu.field", "records"},
    {"kernels.tuning", "kernels.activate", "kernels.rows", "kernels.oldest_triton"},
    {"kernels.penalty", "kernels.score"},
    {"kernels.flow"},
    {"ops"},
    {"networks", "symbols"},
    {"forwards"},
    {"packing"},
    {"velocity"},
    {"penalty", "score", "flow", "jacobian"},
    {"chain", "pullback"},
    {"policy"},
]
ABOVE = ("", "tune", "info", "kernels", "cpu")
"""The package itself, its commands, and folders."""
MOST_ARGUMENTS = 8


def name_of(file: Path) -> str:
    """The module's name without the package's; the package itself is ""."""
    parts = file.relative_to(ROOT / "fdkernels").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for i, floor in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in floor):
            return i
    raise AssertionError(f"fdkernels.{module} has no floor; give it one above")


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a file imports, also inside functions, except imports for type checkers only."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    ours = {name_of(file) for file in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("fdkernels."))
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or not node.module:
            continue
        package, _, module = node.module.partition(".")
        if package == "fdkernels":
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield inner if inner in ours else module


def test_imports_run_one_way() -> None:
    upward = []
    for file in FILES:
        module = name_of(file)
        if module in ABOVE:
            continue
        for imported in imports(ast.parse(file.read_text())):
            if floor_of(imported) > floor_of(module):
                upward.append(f"{module} imports {imported}")
    assert upward == []


def test_no_modules_import_each_other() -> None:
    graph = {name_of(file): set(imports(ast.parse(file.read_text()))) - {name_of(file)} for file in FILES}
    del graph[""]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_names_of_the_policy_mean_one_thing() -> None:
    """Its modules, and what is public in them, have no names that mean something else in the rest of the library."""

    def names(files: list[Path]) -> set[str]:
        found = {file.name for file in files} - {"__init__.py"}
        for file in files:
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found.add(node.name)
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
        return {name for name in found if not name.startswith("_")}

    of_policy = [file for file in FILES if name_of(file).startswith("policy")]
    assert sorted(names(of_policy) & names([file for file in FILES if file not in of_policy])) == []


def test_every_module_has_a_floor() -> None:
    names = [name_of(file) for file in FILES]
    assert all(floor_of(name) >= 0 for name in names if name not in ABOVE)
    found = [name for floor in FLOORS for name in floor]
    assert all(any(name == n or n.startswith(f"{name}.") for n in names) for name in found)


@pytest.mark.parametrize("package", ["fdkernels_ref", "train", "benchmarks", "tools", "tests"])
def test_the_library_imports_nothing_of_those_around_it(package: str) -> None:
    for file in FILES:
        assert f"import {package}" not in (text := file.read_text()), file
        assert f"from {package}" not in text, file


def test_the_reference_stands_alone() -> None:
    for file in (ROOT / "fdkernels_ref").rglob("*.py"):
        roots = {
            (node.module or "").partition(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "fdkernels" not in roots, file


def test_options_travel_in_records() -> None:
    """Except public functions and kernels, no function takes more than eight arguments."""
    public = {"fisher_penalty", "velocity_to_score", "velocity_fisher_penalty", "flow_fisher_penalty"}
    public |= {"integrate_flow", "integrate_flow_groups", "flow_jacobian", "flow_pullback_penalty"}
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
                continue
            arguments = node.args
            count = len(list(itertools.chain(arguments.posonlyargs, arguments.args, arguments.kwonlyargs)))
            kernel = any("triton.jit" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
            if count > MOST_ARGUMENTS and not kernel and getattr(node, "name", "") not in public:
                long.append(f"{name_of(file)}.{getattr(node, 'name', 'lambda')}: {count}")
    assert long == []
