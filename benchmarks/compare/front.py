"""The README's proof: what share of SAM's gain over the base optimizer a method keeps, as a table and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.figure

from benchmarks.compare import tables

# suite -> what a reader calls it
SUITES = {
    "digits": "digits, noisy labels",
    "cifar16": "CIFAR-10, noisy labels",
    "cifar16-clean": "CIFAR-10",
    "cifar16-w4a4": "CIFAR-10 at 4 bits",
    "lspet": "poses",
}
# row -> what a reader calls it, from the best to the worst of the common cost
ROWS = {
    "sam": "SAM",
    "budget-1.2": "ARSAM, `passes=1.2`",
    "budget-1.05": "ARSAM, `passes=1.05`",
    "looksam": "LookSAM, every 5th step",
    "periodic-1.2": "SAM on every 5th step",
    "published": "the paper's rule",
}
# Okabe and Ito's colours, which colour-blind people tell apart, and a mark each
_MARKS = {"digits": ("#E69F00", "o"), "cifar16": ("#56B4E9", "s"), "cifar16-clean": ("#009E73", "^"),
          "cifar16-w4a4": ("#CC79A7", "D"), "lspet": ("#D55E00", "v")}  # fmt: skip


def shares(row: str, name: str, folder: Path) -> float | None:
    """(row - base) / (SAM - base) of a suite's means over the seeds; None where one of them was not run."""
    found = tables.record(name, folder)
    values = {each: found.values(each) for each in (row, "sam", "base")}
    if not all(values.values()):
        return None
    mean = {each: statistics.fmean(own) for each, own in values.items()}
    return (mean[row] - mean["base"]) / (mean["sam"] - mean["base"])


def passes(row: str, names: list[str], folder: Path) -> float:
    """Mean number of passes per step over the suites."""
    runs = [run for name in names for run in tables.record(name, folder).runs.get(row, {}).values()]
    return statistics.fmean(run["passes_per_step"] for run in runs)


def table(names: list[str], folder: Path) -> str:
    """A row per method, a column per suite."""
    rows = [["share of SAM's gain kept", "passes", *(SUITES[name] for name in names)]]
    for row, title in ROWS.items():
        own = [shares(row, name, folder) for name in names]
        cells = ["" if share is None else f"{share:.2f}" for share in own]
        rows.append([title, f"{passes(row, names, folder):.2f}", *cells])
    return tables.markdown(rows)


def draw(names: list[str], folder: Path) -> None:
    """The same as dots, SAM and the base as lines: gain-light.png and gain-dark.png in the folder of the records."""
    for theme, ink, paper in (("light", "#1f2328", "#ffffff"), ("dark", "#f0f6fc", "#0d1117")):
        figure = matplotlib.figure.Figure(figsize=(8, 3.1), layout="constrained", facecolor=paper)
        panel: Any = figure.subplots()
        _dots(panel, names, folder, ink)
        panel.set_facecolor(paper)
        figure.savefig(folder / f"gain-{theme}.png", dpi=150, metadata={"Software": None})


def _dots(panel: Any, names: list[str], folder: Path, ink: str) -> None:
    rows = [row for row in ROWS if row != "sam"][::-1]
    for name in names:
        colour, mark = _MARKS[name]
        own = [(share, y) for y, row in enumerate(rows) if (share := shares(row, name, folder)) is not None]
        panel.plot([x for x, _ in own], [y for _, y in own], mark, color=colour, markersize=7, label=SUITES[name], alpha=0.9)
    top = len(rows) - 0.4
    for x, text in ((0, "the base optimizer\n1 pass per step"), (1, "SAM\n2 passes per step")):
        panel.axvline(x, color=ink, linewidth=1)
        panel.text(x, top, text, color=ink, fontsize=9, ha="center", va="bottom")
    panel.set_yticks(
        range(len(rows)), [f"{ROWS[row].replace('`', '')}\n{passes(row, names, folder):.2f} passes" for row in rows]
    )
    panel.set_ylim(-0.5, top)
    panel.set_xlabel("share of SAM's gain over the base optimizer", color=ink, fontsize=9)
    panel.tick_params(colors=ink, labelsize=9, length=0)
    panel.grid(axis="y", color=ink, alpha=0.15)
    for spine in panel.spines.values():
        spine.set_visible(False)
    legend = panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_color(ink)
