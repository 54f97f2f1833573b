"""Times of steps against each other: in turn, in one process, as ratios of the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]
Closure = Callable[[], Tensor]

EVERY = 5  # steps of a round; rows that sample ascend on one of them


def interleaved(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round, EVERY steps a round.

    Step by step in turn, so that a drift of the machine meets all alike; the first round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for step in range(EVERY):
            first = (turn + step) % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                steps[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent[name] += time.perf_counter() - start
        if turn:
            for name in names:
                seconds[name].append(spent[name] / EVERY)
    return seconds


def rows(seconds: dict[str, list[float]], baseline: dict[str, str]) -> list[dict[str, Any]]:
    """Median milliseconds, and the median and quartiles of the ratio to the baseline's step of the same round."""
    found: list[dict[str, Any]] = []
    for name in seconds:
        row: dict[str, Any] = {"name": name, "against": baseline.get(name), "ms": 1e3 * statistics.median(seconds[name])}
        if name in baseline:
            ratios = sorted(a / b for a, b in zip(seconds[name], seconds[baseline[name]], strict=True))
            row["ratio"] = statistics.median(ratios)
            row["quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print them as a table."""
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  {'ms/step':>8}  {'ratio':>6}  quartiles      against")
    for row in rows:
        ratio = f"{row['ratio']:6.3f}  {row['quartiles'][0]:.3f}-{row['quartiles'][1]:.3f}    " if "ratio" in row else " " * 24
        print(f"{row['name']:{width}}  {row['ms']:8.1f}  {ratio}{row['against'] or ''}")
