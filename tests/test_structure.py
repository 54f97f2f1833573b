"""Imports go one way: arsam <- tasks <- configs <- benchmarks <- tools; arsam needs torch and the standard library alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["arsam", "tasks", "configs", "benchmarks", "tools"]


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    """Kills: an import of a later layer."""
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        forbidden = imported(path) & set(LAYERS[LAYERS.index(layer) + 1 :])
        assert not forbidden, f"{path} imports {forbidden}"


def test_the_core_needs_torch_alone() -> None:
    """Integrations import theirs."""
    allowed = sys.stdlib_module_names | {"torch", "arsam"}
    for path in sorted((ROOT / "arsam").rglob("*.py")):
        if "integrations" not in path.parts:
            assert imported(path) <= allowed, path
