"""Figures of a suite, from its records: accuracy against passes, accuracy and training loss against rho, and age of a PSF."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.figure

from benchmarks.compare import inference, records, tables

_UNDRAWN = ("control", "package")  # far off, or all at two passes
_SEARCHED = ("sam", "sam-warmup", "budget-1.2", "budget-1.2-warmup", "budget-1.05", "budget-1.05-warmup",
             "budget-1.2-beta1.0", "budget-1.2-half-batch", "looksam", "s2-sam", "msam", "published")  # fmt: skip


def draw(name: str, folder: Path) -> list[Path]:
    """The figures of a suite, and of what a newer loop has of it so far; the files that were written."""
    found = tables.record(name, folder)
    newer = tables.under_way(found, folder)
    return [path for each in (found, newer) if each is not None for path in _draw(each, folder)]


def stem(found: tables.Record) -> str:
    """What the names of a suite's figures begin with."""
    return found.name if found.title == found.name else f"{found.name}-loop{found.loop}"


def _draw(found: tables.Record, folder: Path) -> list[Path]:
    """...-passes.png, and ...-rho.png and ...-ageing.png where the records have them."""
    written = [_passes(found, folder / f"{stem(found)}-passes.png")]
    if records.of(found.lines, "tune", found.loop):
        written.append(_radius(found, folder / f"{stem(found)}-rho.png"))
    aged = records.of(found.lines, "ageing", found.loop)
    if aged:
        written.append(_ageing(aged[-1], folder / f"{stem(found)}-ageing.png"))
    return written


def _passes(found: tables.Record, path: Path) -> Path:
    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    panel: Any = figure.subplots()
    points: list[tuple[float, float, float, str]] = []
    for name, runs in found.runs.items():
        row = tables.grouped(name)
        if row is None or row.group in _UNDRAWN:
            continue
        mean, half = inference.interval(found.values(name))
        passes = statistics.fmean(run["passes_per_step"] for run in runs.values())
        points.append((passes, 100 * mean, 0.0 if math.isnan(half) else 100 * half, row.title))
    heights = [y for _, y, _, _ in points]
    gap = (max(heights) - min(heights)) / 40
    free: dict[float, float] = {}  # passes per step, to a tenth -> where the next label may stand
    for x, y, half, title in sorted(points, key=lambda point: point[1]):
        panel.errorbar(x, y, half, fmt="o", markersize=4, capsize=2)
        label = max(y, free.get(round(x, 1), y))
        free[round(x, 1)] = label + gap
        panel.annotate(title, (x, label), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
    panel.set(xlabel="passes per step", ylabel=f"{found.metric}, %", title=f"{found.title}: mean and 95 % interval")
    panel.set_xlim(right=2.5)
    return _saved(figure, [panel], path)


def _radius(found: tables.Record, path: Path) -> Path:
    figure = matplotlib.figure.Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(_SEARCHED):
        curve = searched(found, name)
        if curve:
            style = {
                "marker": "o",
                "markersize": 3,
                "linestyle": "--" if (row := tables.grouped(name)) is not None and row.group == "schedule" else "-",
                "color": f"C{number // 2 % 10}",
            }
            left.plot([x for x, _, _ in curve], [100 * y for _, y, _ in curve], label=tables.title(name), **style)
            right.plot([x for x, _, _ in curve], [z for _, _, z in curve], **style)
    left.set(ylabel=f"{found.metric} on held-out images, %", title=found.title)
    right.set(ylabel="training loss after the last step", yscale="log")
    for panel in (left, right):
        panel.set(xlabel="rho", xscale="log")
    left.legend(fontsize=7)
    return _saved(figure, [left, right], path)


def searched(found: tables.Record, name: str) -> list[tuple[float, float, float]]:
    """(rho, metric, training loss) of a row's search over rho, means over the tuning seeds, from the smallest rho on."""
    lines = [line for line in records.of(found.lines, "tune", found.loop) if line["row"] == name and "rho" in line["settings"]]
    first = {k: v for k, v in lines[0]["settings"].items() if k != "rho"} if lines else {}
    by_rho: dict[float, list[records.Line]] = {}
    for line in lines:
        if {k: v for k, v in line["settings"].items() if k != "rho"} == first:  # while no other setting was searched
            by_rho.setdefault(line["settings"]["rho"], []).append(line)
    return [
        (rho, statistics.fmean(x[found.metric] for x in own), statistics.fmean(x["training_loss"] for x in own))
        for rho, own in sorted(by_rho.items())
    ]


def _ageing(aged: records.Line, path: Path) -> Path:
    figure = matplotlib.figure.Figure(figsize=(5.5, 3.5), layout="constrained")
    panel: Any = figure.subplots()
    for start, values in zip(aged["starts"], aged["cosine_by_start"], strict=True):
        panel.plot(aged["ages"], values, alpha=0.4, label=f"from step {start}")
    panel.plot(aged["ages"], aged["cosine"], color="black", label="mean")
    panel.legend(fontsize=7)
    panel.set_ylim(bottom=min(0.0, min(min(values) for values in aged["cosine_by_start"])))
    panel.set(title="cosine of a PSF with the one j steps before", xlabel="j")
    return _saved(figure, [panel], path)


def _saved(figure: Any, panels: list[Any], path: Path) -> Path:
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
