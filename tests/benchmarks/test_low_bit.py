"""The table of 8-bit files, and the page that shows it."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.speed import low_bit
from tests.tools.test_commands import ROOT


def test_the_page_shows_the_record() -> None:
    """Kills: a table that was typed, or is of another measurement."""
    record = json.loads((ROOT / "benchmarks/quant/files.json").read_text())
    text = (ROOT / "docs/quant.md").read_text()
    assert low_bit.page(text, record) == text


def test_table() -> None:
    """Kills: integer kernels counted as float ones, seconds for milliseconds, quartiles in place of the median."""
    values = {"median": 2.0, "low": 1.0, "high": 4.0}
    row: dict[str, Any] = {
        "mb": 4.861,
        "agreement": 0.9849,
        "distance": 0.01,
        "kernels": {"QLinearConv": 3, "Gemm": 1, "Add": 5},
    }
    row |= {f"{what}_batch_{size}": values for what in ("ms", "faster") for size in (1, 8)}
    row |= {"load_seconds": {"median": 0.2, "low": 0.1, "high": 0.3}, "resident_mb": values, "needed_mb": values}
    lines = low_bit.table({"networks": {"net": {"rows": {"ours": row}}}}).splitlines()
    assert lines[2] == (
        "| net | ours, W8A8 | 4.86 | 2.00 (1.00-4.00) | 2.00 (1.00-4.00) | 200 (100-300) | 2.0 (1.0-4.0) | 0.985 | 0.0100 | 1 |"
    )


def test_spread() -> None:
    """Kills: extremes."""
    assert low_bit.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"low": 1.5, "median": 3.0, "high": 52.0}
