"""Optimizers compared on one small workload: every row of a suite trained on every seed, by the loop that users run.

All runs of a suite share network and schedule and, seed by seed, the data's division, the initial weights and the order of
the batches; they differ in the row alone. A finished run is one line of the suite's records, and is not run again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import from_config, probes, records
from benchmarks.compare.memory_task import configured
from benchmarks.compare.records import LOOP, Book
from benchmarks.compare.schema import Data, Large, Row, Settings, Suite
from tasks import engine, log, search
from tasks.config import describe
from tasks.errors import UserError

Train = Callable[[Row, int, Settings, float, str], dict[str, Any]]  # of row, seed, settings, ascents and split: the figures
TUNING = 1000  # the first of the seeds that settings are chosen on


def compare(suite: Suite | Large, out: Path, seeds: int, device: torch.device, only: list[str] | None = None) -> None:
    """Run what has not been run, row by row: the search of its settings, then its seeds.

    Args:
        suite: the workload.
        out: folder of the suite's records, SUITE.jsonl, and of the runs' folders where the suite is a config.
        seeds: 0, 1, ..., seeds - 1.
        device: where.
        only: rows by name; None: all of the suite. "base", "sam" and rows that these refer to are always run.

    Raises:
        UserError: no such row, no data, or the records are of other settings.
    """
    rows = chosen(suite, only)
    train = _trainer(suite, out, device)
    with records.held(out / f"{suite.name}.jsonl") as book:
        _check_settings(suite, book, device)
        for row in rows:
            settings = _tuned(suite, row, book, train)
            for seed in range(seeds):
                if not _known(book, row, seed, settings):
                    found = train(row, seed, settings, _ascents(row, book, seed), "test")
                    _show(suite, book.write(_named("run", suite, row, seed, settings) | found))
        if isinstance(suite, Suite) and book.find("ageing") is None:
            rho = _settings_of(book, suite.row("sam"))["rho"]
            found = probes.ageing(suite, suite.data(0), rho, device)
            book.write({"kind": "ageing", "loop": LOOP, "suite": suite.name, **found})


def _trainer(suite: Suite | Large, out: Path, device: torch.device) -> Train:
    """What trains a row of the suite once."""
    if isinstance(suite, Large):
        return partial(from_config.run, suite, device=device, out=out / suite.name)
    data = lru_cache(maxsize=8)(suite.data)
    megabytes: dict[str, float] = {}

    def train(row: Row, seed: int, settings: Settings, ascents: float, split: str) -> dict[str, Any]:
        found = run(suite, row, data(seed), seed, settings, ascents, split, device)
        if split == "test":
            if row.name not in megabytes:
                megabytes[row.name] = probes.memory(suite, row, data(seed), device)
            found["peak_memory_mb"] = megabytes[row.name]
        return found

    return train


def run(
    suite: Suite, row: Row, data: Data, seed: int, settings: Settings, ascents: float, split: str, device: torch.device
) -> dict[str, Any]:
    """Train a row once; the figures that are recorded.

    Args:
        suite: the workload.
        row: the optimizer.
        data: of the suite and seed.
        seed: of the run.
        settings: as chosen for the row.
        ascents: share of the steps that ascend, for rules that are given one.
        split: that is evaluated.
        device: where.
    """
    config = configured(suite, row, data, seed, settings, ascents, split)
    start = time.process_time()
    result = engine.train(config, None, device=device, name=row.name)
    spent = time.process_time() - start
    history: list[dict[str, float]] = config.task.history  # type: ignore[attr-defined]
    chosen = history[-1]
    if row.early:
        chosen = max(history, key=lambda figures: figures.get("val", figures[suite.metric]))
    return {
        suite.metric: chosen[suite.metric],
        "training_loss": chosen["training_loss"],
        "steps": result["steps"],
        "ascents": result["ascents"],
        "passes_per_step": 1 + row.part * result["ascents"] / result["steps"],
        "cpu_seconds": round(spent, 2),
        **({"epoch": history.index(chosen) + 1} if row.early else {}),
        **({"skipped": result["skipped"]} if result.get("skipped") else {}),
    }


def _named(kind: str, suite: Suite | Large, row: Row, seed: int, settings: Settings) -> dict[str, Any]:
    return {"kind": kind, "loop": LOOP, "suite": suite.name, "row": row.name, "seed": seed, "settings": settings}


def _tuned(suite: Suite | Large, row: Row, book: Book, train: Train) -> Settings:
    """The settings with the best mean metric on held-out images over the tuning seeds, one knob after the other."""
    if row.borrows is not None:
        return _settings_of(book, suite.row(row.borrows))
    settings = dict(row.settings)
    ascents = row.ascents
    for knob in row.knobs:
        if isinstance(ascents, str):
            raise ValueError(f"row {row.name}: with the ascents of another row, it must borrow its settings too")

        def score(value: float, name: str = knob.name, ascents: float = ascents) -> float:
            tried, found = {**settings, name: value}, []
            for seed in range(TUNING, TUNING + suite.tune_seeds):
                line = book.find("tune", row=row.name, seed=seed, settings=tried)
                if line is None:
                    line = book.write(_named("tune", suite, row, seed, tried) | train(row, seed, tried, ascents, "val"))
                    _show(suite, line)
                found.append(line[suite.metric])
            return statistics.fmean(found)

        start = [knob.scale * rho for rho in suite.rhos] if knob.name == "rho" and not knob.start else knob.start
        scores = search.climb(score, start[0], len(start), ratio=knob.ratio, largest=knob.largest)
        settings[knob.name] = search.best(scores)
    return settings


def _known(book: Book, row: Row, seed: int, settings: Settings) -> bool:
    """Is there a run of this row and seed? One with other settings is an error."""
    line = book.find("run", row=row.name, seed=seed)
    if line is not None and line["settings"] != settings:
        raise UserError(
            f"{book.path}: {row.name}, seed {seed} has {line['settings']}, those chosen are {settings};"
            " remove the line, or name another --out"
        )
    return line is not None


def _settings_of(book: Book, row: Row) -> Settings:
    line = book.find("run", row=row.name)
    if line is None:
        raise ValueError(f"row {row.name} must stand before the rows that take its settings")
    return line["settings"]


def _ascents(row: Row, book: Book, seed: int) -> float:
    """The share of the steps that ascend: the row's, or that of the run that it names."""
    if not isinstance(row.ascents, str):
        return row.ascents
    line = book.find("run", row=row.ascents, seed=seed)
    if line is None:
        raise ValueError(f"row {row.ascents} must stand before {row.name}")
    return line["ascents"] / line["steps"]


def _check_settings(suite: Suite | Large, book: Book, device: torch.device) -> None:
    """Write what the suite is run with, or compare it with what the records say."""
    left_out = ("rows", "seeds", "about")
    settings = {k: describe(v) for k, v in vars(suite).items() if k not in left_out and not callable(v)}
    settings = json.loads(json.dumps(settings))  # as it is read back
    line = book.find("suite")
    if line is None:
        book.write({"kind": "suite", "loop": LOOP, "suite": settings, "metric": suite.metric, **log.environment(device)})
        return
    changed = [f"{k} was {line['suite'].get(k)}, is {v}" for k, v in settings.items() if line["suite"].get(k) != v]
    if changed:
        raise UserError(f"{book.path}: holds runs of other settings: {'; '.join(changed)}; name another --out")


def chosen(suite: Suite | Large, only: list[str] | None) -> list[Row]:
    """The rows of these names, and those that they are compared with; None: all.

    Raises:
        UserError: no such row.
    """
    known = {row.name: row for row in suite.rows}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise UserError(f"{unknown[0]}: no row of the suite {suite.name}; its rows are {', '.join(known)}")
    names = {*(known if only is None else only), "base", "sam"}
    while True:
        needed = {x for name in names for x in (known[name].ascents, known[name].borrows) if isinstance(x, str)} - names
        if not needed:
            return [row for row in suite.rows if row.name in names]
        names |= needed


def _show(suite: Suite | Large, line: dict[str, Any]) -> None:
    chosen = "  ".join(f"{name} {value:g}" for name, value in line["settings"].items())
    print(
        f"{line['kind']:5}{line['seed']:5}  {line['row']:28}{100 * line[suite.metric]:6.2f} %  "
        f"{line['passes_per_step']:.3f} passes/step  {chosen}",
        flush=True,
    )
