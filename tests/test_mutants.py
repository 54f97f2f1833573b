"""The mutants stay applicable: a mutant whose text has moved guards nothing, and nobody would notice."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    """The module tests/mutants.py, which is a script."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions(path: Path) -> set[str]:
    """Names of the functions that a file defines at its top level."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_mutant_applies() -> None:
    """Kills: a change of the source that leaves a mutant without its place, or with two."""
    stale = {
        title: (ROOT / file).read_text().count(old)
        for title, file, old, _, _ in load().MUTANTS
        if (ROOT / file).read_text().count(old) != 1
    }
    assert not stale, f"mutants whose text does not occur exactly once: {stale}"


def test_every_mutant_has_its_test() -> None:
    """Kills: a test that was renamed or moved, so that pytest would run none."""
    for title, _, _, _, test in load().MUTANTS:
        file, _, function = test.partition("::")
        assert function.partition("[")[0] in functions(ROOT / file), f"{title}: no test {test}"
