"""A trial is a list of cases, each measured once and kept as a line of benchmarks/records/trials/NAME.jsonl."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "records/trials"
Case = dict[str, Any]


def measure(name: str, cases: Iterable[Case], run: Callable[..., dict[str, Any]], folder: Path = FOLDER) -> None:
    """Measure the cases that the trial's file lacks, ``run(**case)``, on one thread.

    Args:
        name: of the file.
        cases: what tells one run from another.
        run: a case's figures.
        folder: of the file.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not any(case.items() <= line.items() for line in read(name, folder)):
            line = json.dumps({**case, **run(**case)})
            with open(folder / f"{name}.jsonl", "a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def read(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The lines of a trial; no file has none."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation, as a table shows them."""
    if not values:
        return ""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{spread}"
