"""The README: its lines of use run as they stand, its figures are those of the records, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.compare import readme, records
from benchmarks.compare.rows import ROWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
PROJECT = re.search(r'Homepage = "(.+?)"', (ROOT / "pyproject.toml").read_text())


def test_the_ten_lines_train() -> None:
    """With a model, a loader, a loss and a scheduler of the reader's. Kills: an example that no longer fits the optimizer."""
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    before = [p.detach().clone() for p in model.parameters()]
    names: dict[str, Any] = {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(10)],
        "scheduler": SimpleNamespace(step=lambda: None),
    }
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    assert names["optimizer"].stats["steps"] == 10
    assert names["optimizer"].stats["ascents"] == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_it_is_read_in_minutes() -> None:
    """Kills: a lab report."""
    assert len(README.splitlines()) <= 150
    long = [line for line in README.splitlines() if len(line) > 120 and not line.lstrip().startswith(("|", "<"))]
    assert not long
    assert len([line for line in PROSE[: PROSE.index("## How it works")].splitlines() if line.startswith("|")]) <= 9


def test_its_links_are_whole() -> None:
    """An index page shows the README far from the repository. Kills: a relative link, or one to a file that has gone."""
    assert PROJECT is not None
    places = re.escape(PROJECT[1].removeprefix("https://github.com/"))
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', PROSE)
    assert len(links) > 15
    for link in (first or second for first, second in links):
        assert link.startswith("https://"), link
        own = re.match(rf"https://(?:raw\.githubusercontent|github)\.com/{places}/(?:blob/|tree/)?main/([^#]+)", link)
        assert own is None or (ROOT / own[1]).exists(), f"{link}: no such file"


def test_its_configs_are_there() -> None:
    """Kills: a command that names a config or a tool which has gone."""
    named = re.findall(r"\b((?:configs|tools)/[\w/]+\.py)", README)
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_says_whom_it_is_for(page: Path) -> None:
    """Kills: a page that begins without its reader."""
    first = next(line for line in page.read_text().splitlines()[1:] if line)
    assert first.startswith("For "), first


def test_the_results_are_those_of_the_records() -> None:
    """Kills: a table edited by hand, or records without `python tools/bench.py readme` after them."""
    assert "<!-- results: " in README
    assert readme.readme(README, records.FOLDER) == README
    page = (ROOT / "docs/rho.md").read_text()
    assert readme.rho(page, records.FOLDER) == page and "<!-- rho -->" in page
    assert readme.results(records.FOLDER) == (ROOT / "docs/results.md").read_text()


def test_the_records_keep_what_a_budget_promises() -> None:
    """Passes per step to within one step on every recorded run. Kills: a record of other rules than its name says."""
    evenly = {row.name: row for row in ROWS if row.group in ("arsam", "decay", "schedule") and row.ascents}
    found = [line for path in records.FOLDER.glob("*.jsonl") for line in records.read(path)]
    runs = [line for line in found if line["kind"] == "run" and line["row"] in evenly]
    assert len(runs) > 50
    for run in runs:
        row = evenly[run["row"]]
        assert isinstance(row.ascents, float)
        assert abs(run["ascents"] - row.ascents * run["steps"]) <= 1, run
        part = row.part if run["loop"] > 1 else 1.0  # the loop of before did not count a part
        assert run["passes_per_step"] == pytest.approx(1 + part * run["ascents"] / run["steps"]), run


def test_the_recipe_for_rho() -> None:
    """It finds the best of a ladder, inside. Kills: a search that stops at its edge, or that never ends."""
    page = (ROOT / "docs/rho.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/rho.md", "exec"), names)
    for peak, found in ((0.1, 0.1), (0.4, 0.4), (0.02, 0.0177), (100.0, 1.6)):
        tried: list[float] = []

        def train(rho: float, tried: list[float] = tried) -> tuple[float, Any]:
            tried.append(rho)
            return rho, SimpleNamespace(stats={})

        best = names["find_rho"](train, lambda rho, peak=peak: -abs(rho / peak - 1) if rho < peak else peak / rho - 1)
        assert best == pytest.approx(found, rel=0.05) and len(tried) == len(set(tried)) <= 11
