"""The README's results and docs/results.md, written from the records."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from benchmarks.compare import figures, front, tables
from benchmarks.compare.suites import SUITES

_RHO = re.compile(r"(<!-- rho -->\n).*?(<!-- /rho -->)", re.DOTALL)
_BLOCK = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- /results -->)", re.DOTALL)
_ORDER = ("digits", "digits-dropout", "cifar16", "cifar16-clean", "cifar16-w4a4", "lspet")
_HEAD = """# Results

For whoever wants the figures, all of them.

This page is written by `python tools/bench.py readme` from the records in [benchmarks/records](../benchmarks/records), a file
of JSON lines per suite. How a suite is run, and what was tried besides: [benchmarks/README.md](../benchmarks/README.md).

A *pass* is one forward and one backward pass over a batch; the base optimizer takes one per step, SAM two. An *ascent* is a
step with two passes. *rho* is the length of the perturbation of the weights; each rule chooses its own on held-out images.
"Rho warmed up" means that rho rises linearly from 0 over the first 30 % of the steps.

Every suite is small: it says how the rules compare where many runs are affordable, and nothing about ImageNet or COCO.

"""
_WORDS = """
Each cell says what the paired differences of the seeds allow, followed by their mean and 95 % interval in points.
*Better* and *worse*: a two-sided t-test finds a difference. *Not worse*: a one-sided test excludes that the row is below SAM by
the margin, which was fixed beforehand: one point, or a quarter of SAM's gain over the base, the smaller. *No difference found*
is no claim of equality. All tests of a suite are corrected together (Holm, level 0.05).
"""
_PICTURES = (("passes", "accuracy against passes per step"), ("rho", "accuracy and training loss against rho"))
_OLD = (
    " These runs were made by the study's own loop of before, with rho on a coarse grid, one seed for the search and rows"
    " that borrow a rho; they stand until new ones replace them."
)


def readme(text: str, folder: Path) -> str:
    """A text with its blocks ``<!-- results: SUITE SUITE ... -->`` filled from the records of those suites.

    Args:
        text: of the page.
        folder: of the records.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{front.table(block[2].split(), folder)}\n{block[3]}", text)


def rho(text: str, folder: Path) -> str:
    """docs/rho.md with its table of the rho that was chosen, a row per rule, a column per suite."""
    return _RHO.sub(lambda block: f"{block[1]}{tables.radii(_columns(folder))}\n{block[2]}", text)


def _columns(folder: Path) -> list[tables.Record]:
    """Of the suites in order, each followed by what a newer loop has of it so far."""
    found = [tables.record(name, folder) for name in _ORDER if (folder / f"{name}.jsonl").exists()]
    return [column for each in found for column in (each, tables.under_way(each, folder)) if column is not None]


def results(folder: Path) -> str:
    """docs/results.md."""
    columns = _columns(folder)
    parts = [
        _HEAD, "Mean over the seeds in percent, its 95 % interval by Student's t, and in brackets the number of seeds:\n\n",
        tables.beside(columns), "\n\n## What may be said\n", _WORDS, "\n", tables.answers(columns),
        "\n\n## The rho that was chosen\n\n", tables.radii(columns), "\n",
    ]  # fmt: skip
    for found in columns:
        about = f"{_sentence(SUITES[found.name].about)}.{_OLD if found.loop == 1 else ''} {tables.search_cost(found)}"
        parts.append(f"\n## {_sentence(found.title)}\n\n{textwrap.fill(about, 118)}\n\n")
        parts += [_picture(found, *each, folder) for each in _PICTURES]
        parts += [tables.table(found), "\n"]
    return "".join(parts)


def _picture(found: tables.Record, kind: str, what: str, folder: Path) -> str:
    path = folder / f"{figures.stem(found)}-{kind}.png"
    return f"![{found.title}: {what}](../benchmarks/records/{path.name})\n\n" if path.exists() else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
