"""The plan of the house: imports go one way, no circles, no overfull files; arsam needs torch and the standard library."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["arsam", "tasks", "configs", "benchmarks", "tools"]  # each may import those before it
MOST_LINES = 220  # of code in a file; docstrings, comments and blank lines are free


def files(layer: str) -> list[Path]:
    """The Python files of a layer."""
    found = sorted((ROOT / layer).rglob("*.py"))
    assert found, f"{layer} has no Python file"
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, and for type checkers only too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def asked(path: Path, modules: set[str]) -> set[str]:
    """Those of the modules that a file imports: of `from package import submodule` the submodule, not its package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & modules) | ({node.module} if whole - modules else set())
    return names & modules


def module(path: Path) -> str:
    """The dotted name of a file."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    """Kills: an import of a later layer."""
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    for path in files(layer):
        forbidden = {name.split(".")[0] for name in imported(path)} & later
        assert not forbidden, f"{path} imports {forbidden}"


def test_the_core_needs_torch_alone() -> None:
    """Kills: another dependency of the optimizer. Integrations import theirs."""
    allowed = sys.stdlib_module_names | {"torch", "arsam"}
    for path in files("arsam"):
        if "integrations" not in path.parts:
            assert {name.split(".")[0] for name in imported(path)} <= allowed, path


@pytest.mark.parametrize("layer", LAYERS)
def test_no_circle_inside(layer: str) -> None:
    """Kills: two modules of a layer that import each other, directly or by way of others."""
    modules = {module(path): path for path in files(layer)}
    graph = {name: asked(path, set(modules)) - {name} for name, path in modules.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(("first", "second"), [("tasks.pose", "tasks.classification"), ("tasks.quant", "tasks.pose")])
def test_tasks_do_not_look_sideways(first: str, second: str) -> None:
    """Kills: a task that reaches into another; what both use is the library tasks.quant, which knows neither."""
    pairs = [(first, second), (second, first)] if "quant" not in first else [(first, second), (first, "tasks.classification")]
    for package, other in pairs:
        for path in files(package.replace(".", "/")):
            assert not [name for name in imported(path) if name.startswith(other)], f"{path} imports {other}"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_file_is_overfull(layer: str) -> None:
    """Kills: a file that has become two."""
    sizes = {str(path.relative_to(ROOT)): code_lines(path.read_text()) for path in files(layer)}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES}


def test_code_lines_are_counted() -> None:
    """Kills: a count that is always small."""
    lines = ['"""A docstring', 'of two lines."""', "", "# a comment", "x = [", "    1,", "]", "", "", "def f() -> None:"]
    source = "\n".join([*lines, '    """Doc."""', "    return x", ""])
    assert code_lines(source) == 5
