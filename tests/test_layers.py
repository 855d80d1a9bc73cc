"""The layers of the package: nothing imports from a later one, and no files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sparkmim

PACKAGE = Path(sparkmim.__file__).parent

LAYERS = (
    ("_version", "errors", "failures", "arguments", "files", "terminal", "trust", "allocator", "machine", "results"),
    ("sparse",),
    ("models",),
    ("data",),
    ("drawing",),
    ("runs",),
    ("interop",),
    ("evaluation",),
    ("training",),
    ("visualize",),
    ("commands", "words", "paths", "together"),
    ("cli", "__main__", "__init__"),
)
"""Lowest first."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def module_names() -> dict[str, Path]:
    """Files of the package by the name of their module."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it: at the top, in a function, for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sparkmim."):
            found = [node.value]  # for importlib
        else:
            continue
        for dotted in found:
            if dotted.split(".")[0] != "sparkmim":
                continue
            inner = dotted.removeprefix("sparkmim").lstrip(".")
            while inner and inner not in modules and f"{inner}.__init__" not in modules:
                inner = inner.rpartition(".")[0]
            if inner or not isinstance(node, ast.Constant):
                yield inner if inner in modules else f"{inner}.__init__".lstrip(".")


def test_every_file_has_a_layer() -> None:
    assert {name.split(".")[0] for name in module_names()} == LAYER.keys()


@pytest.mark.parametrize("name", module_names())
def test_nothing_imports_from_a_later_layer(name: str) -> None:
    modules = module_names()
    own = LAYER[name.split(".")[0]]
    upwards = {other for other in imports(name, modules[name], modules) if LAYER[other.split(".")[0]] > own}
    if name != "__init__":
        assert not upwards, f"{name} imports {', '.join(sorted(upwards))}, which stand in later layers"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = module_names()
    graph = {name: {other for other in imports(name, path, modules) if other != name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("name", ["weights", "report", "export", "features"])
def test_no_package_hides_a_function(name: str) -> None:
    """Importing a package `sparkmim.weights` would take the place of the function `sparkmim.weights`."""
    assert name not in {module.split(".")[0] for module in module_names()}


def test_the_map_for_contributors_names_every_file() -> None:
    written = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {path.name for path in module_names().values() if path.parent.name != "rules"} - {"__init__.py"}
    assert not {name for name in names if f"`{name}`" not in written and f"`{name.removesuffix('.py')}`" not in written}
