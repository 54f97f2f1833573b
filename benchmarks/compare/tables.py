"""What comparisons came to, as tables in Markdown, from the records alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.compare import inference, records
from benchmarks.compare.rows import ROWS
from benchmarks.compare.schema import Row

KNOWN = {row.name: row for row in ROWS}
# "is A better than B, or at least not worse": held against SAM with a margin, against the others without
QUESTIONS = (
    ("sam", "base"), ("base-tuned", "base"),
    ("budget-1.05", "sam"), ("budget-1.1", "sam"), ("budget-1.2", "sam"), ("budget-1.2-half-batch", "sam"),
    ("budget-1.2-beta1.0", "sam"), ("looksam", "sam"), ("msam", "sam"), ("s2-sam", "sam"), ("published", "sam"),
    ("budget-1.05-warmup", "sam"), ("budget-1.2-warmup", "sam"),
    ("sam-warmup", "sam"), ("budget-1.05-warmup", "sam-warmup"), ("budget-1.2-warmup", "sam-warmup"),
    ("budget-1.05-warmup", "budget-1.05"), ("budget-1.2-warmup", "budget-1.2"),
    ("budget-1.2", "base-tuned"), ("budget-1.2", "base-1.2x"), ("budget-1.2", "periodic-1.2"), ("budget-1.2", "bernoulli-1.2"),
    ("budget-1.2", "late-1.2"), ("budget-1.2", "looksam"), ("budget-1.2", "budget-1.2-beta1.0"), ("budget-1.2", "msam"),
    ("budget-1.2", "s2-sam"),
)  # fmt: skip
MAIN = (
    "base", "base-tuned", "sam", "sam-warmup", "budget-1.05", "budget-1.05-warmup", "budget-1.2", "budget-1.2-warmup",
    "budget-1.2-half-batch", "budget-1.2-beta1.0", "looksam", "msam", "s2-sam", "periodic-1.2", "bernoulli-1.2", "late-1.2",
    "published",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A suite's records, read once.

    Args:
        name: of the suite.
        title: of its column.
        metric: of the suite.
        loop: that made the runs.
        lines: all of them.
        runs: on the test images.
    """

    name: str
    title: str
    metric: str
    loop: int
    lines: list[records.Line]
    runs: records.Runs

    def values(self, row: str) -> list[float]:
        """The metric of a row's runs."""
        return [run[self.metric] for run in self.runs.get(row, {}).values()]

    def differences(self, row: str, rival: str) -> list[float]:
        """Row minus rival on the seeds that both have."""
        one, other = self.runs.get(row, {}), self.runs.get(rival, {})
        return [one[seed][self.metric] - other[seed][self.metric] for seed in sorted(one.keys() & other.keys())]


@cache
def _record(path: Path, loop: int | None, _changed: float) -> Record:
    lines = records.read(path)
    chosen = records.loop(lines, MAIN) if loop is None else loop
    metric = next(line["metric"] for line in lines if line["kind"] == "suite")
    title = path.stem if loop is None else f"{path.stem}, present loop"
    return Record(path.stem, title, metric, chosen, lines, records.runs(lines, chosen))


def record(name: str, folder: Path, loop: int | None = None) -> Record:
    """The records of a suite, of the loop that counts or of this one."""
    path = folder / f"{name}.jsonl"
    return _record(path, loop, path.stat().st_mtime_ns)


def under_way(found: Record, folder: Path) -> Record | None:
    """The records of a newer loop, whose study is not finished."""
    newest = records.loops(found.lines)[0]
    return record(found.name, folder, newest) if newest > found.loop else None


def title(name: str) -> str:
    """A row's title; its name where the row is no more."""
    return KNOWN[name].title if name in KNOWN else f"`{name}`"


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def percent(value: tuple[float, float], sign: str = "") -> str:
    """Mean and half an interval, in percent."""
    return f"{100 * value[0]:{sign}.2f}" + ("" if math.isnan(value[1]) else f" ± {100 * value[1]:.2f}")


def table(found: Record) -> str:
    """A line per row of a suite that has runs: metric, differences seed by seed, passes, memory and what was chosen."""
    ordered = [row for row in KNOWN if row in found.runs] + sorted(found.runs.keys() - KNOWN.keys())
    rows = [["row", "", "n", f"{found.metric}, %", "minus base", "minus SAM", "passes/step", "MB", "training loss", "chosen"]]
    for row in ordered:
        runs = list(found.runs[row].values())
        against = [found.differences(row, rival) for rival in ("base", "sam")]
        rows.append(
            [
                f"`{row}`", title(row), str(len(runs)), percent(inference.interval(found.values(row))),
                *(percent(inference.interval(values), "+") if values else "" for values in against),
                f"{statistics.fmean(run['passes_per_step'] for run in runs):.3f}", _mean("peak_memory_mb", runs),
                _mean("training_loss", runs), chosen(runs[0]["settings"]),
            ]
        )  # fmt: skip
    return markdown(rows)


def _mean(name: str, runs: list[records.Line]) -> str:
    return f"{statistics.fmean(run[name] for run in runs):.3g}" if all(name in run for run in runs) else ""


def chosen(settings: dict[str, float]) -> str:
    """The settings of a run, in words."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def beside(found: list[Record]) -> str:
    """A row per optimizer of the main table, a column per suite: the metric in percent, its interval, n and passes."""
    rows = [["passes", "", *(each.title for each in found)]]
    for row in MAIN:
        runs = [list(each.runs.get(row, {}).values()) for each in found]
        if not any(runs):
            continue
        cells = [
            f"{percent(inference.interval(each.values(row)))} ({len(own)})" if own else ""
            for each, own in zip(found, runs, strict=True)
        ]
        spent = [statistics.fmean(run["passes_per_step"] for run in own) for own in runs if own]
        passes = f"{min(spent):.2f}" + (f" to {max(spent):.2f}" if max(spent) - min(spent) > 0.005 else "")
        rows.append([passes, title(row), *cells])
    return markdown(rows)


def answers(found: list[Record]) -> str:
    """A row per question, a column per suite: what may be said, and the difference seed by seed that says so."""
    rows = [["", *(each.title for each in found)]]
    columns: list[dict[tuple[str, str], str]] = [_answered(each) for each in found]
    for question in QUESTIONS:
        if any(question in column for column in columns):
            cells = [column.get(question, "") for column in columns]
            rows.append([f"{title(question[0])} against {title(question[1])}", *cells])
    return markdown(rows)


def _answered(found: Record) -> dict[tuple[str, str], str]:
    """The questions that a suite's runs can answer, corrected together."""
    gains = found.differences("sam", "base")
    margin = inference.margin(gains) if len(gains) > 1 else None
    asked = {(row, rival): found.differences(row, rival) for row, rival in QUESTIONS}
    family = {
        (row, rival): inference.paired(values, margin if rival in ("sam", "sam-warmup") else None)
        for (row, rival), values in asked.items()
        if len(values) > 1
    }
    said = inference.words(list(family.values()))
    return {
        question: f"{word}, {percent((difference.mean, difference.half), '+')}"
        for (question, difference), word in zip(family.items(), said, strict=True)
    }


def search_cost(found: Record) -> str:
    """What the search of a suite cost, in a sentence."""
    tuned = [line for line in found.lines if line["kind"] == "tune" and line["loop"] == found.loop]
    if not tuned:
        return "No search is recorded."
    passes = sum(line["steps"] * line["passes_per_step"] for line in tuned)
    own = sum(run["steps"] * run["passes_per_step"] for row in found.runs.values() for run in row.values())
    rows = len({line["row"] for line in tuned})
    return f"The search: {len(tuned)} runs for {rows} rows, {passes / own:.1f} times the passes of the runs that are reported."


def radii(found: list[Record]) -> str:
    """The rho that was chosen, a row per rule, a column per suite."""
    rows = [["", *(each.title for each in found)]]
    for row in MAIN:
        runs: list[dict[str, Any] | None] = [next(iter(each.runs.get(row, {}).values()), None) for each in found]
        cells = [f"{run['settings']['rho']:.3g}" if run and "rho" in run["settings"] else "" for run in runs]
        if any(cells):
            rows.append([title(row), *cells])
    return markdown(rows)


def grouped(row: str) -> Row | None:
    """The row as it is defined today, where it is."""
    return KNOWN.get(row)
