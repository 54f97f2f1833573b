"""The README's results and docs/results.md, written from the records."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from benchmarks.compare import front, tables
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
    return _RHO.sub(lambda block: f"{block[1]}{tables.radii(_names(folder), folder)}\n{block[2]}", text)


def _names(folder: Path) -> list[str]:
    return [name for name in _ORDER if (folder / f"{name}.jsonl").exists()]


def results(folder: Path) -> str:
    """docs/results.md."""
    names = _names(folder)
    parts = [
        _HEAD, "Mean over the seeds in percent, its 95 % interval by Student's t, and in brackets the number of seeds:\n\n",
        tables.beside(names, folder), "\n\n## What may be said\n", _WORDS, "\n", tables.answers(names, folder),
        "\n\n## The rho that was chosen\n\n", tables.radii(names, folder), "\n",
    ]  # fmt: skip
    for name in names:
        found = tables.record(name, folder)
        old = "" if found.loop > 1 else _OLD
        about = f"{_sentence(SUITES[name].about)}.{old} {tables.search_cost(name, folder)}"
        parts.append(f"\n## {name}\n\n{textwrap.fill(about, 118)}\n\n")
        for kind, what in (("passes", "accuracy against passes per step"), ("rho", "accuracy and training loss against rho")):
            if (folder / f"{name}-{kind}.png").exists():
                parts.append(f"![{name}: {what}](../benchmarks/records/{name}-{kind}.png)\n\n")
        parts += [tables.table(name, folder), "\n"]
    return "".join(parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
