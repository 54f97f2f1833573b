"""The pages that show a trial's table, in a block ``<!-- trial: NAME --> ... <!-- /trial -->``."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.trials import bound, dropout, several, signs

_DOCS = Path(__file__).parents[2] / "docs"
PAGES = [_DOCS / "method.md", _DOCS / "rho.md", _DOCS / "loops.md"]
_TABLES = {
    "bound": bound.table,
    "dropout": dropout.table,
    "outlier": bound.table_of_outliers,
    "several": several.table,
    "signs": signs.table,
}
_BLOCK = re.compile(r"(<!-- trial: (\w+) -->\n).*?(<!-- /trial -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the records have them now."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_TABLES[block[2]]()}\n{block[3]}", text)
