"""A search over one setting on a ladder of values, each a constant factor from the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def climb(
    score: Callable[[float], float],
    first: float,
    count: int,
    *,
    ratio: float = math.sqrt(2),
    largest: float = math.inf,
    further: int = 8,
) -> dict[float, float]:
    """Measure `count` neighbours of the ladder, and go on beyond an end while the best one lies there.

    The best value then has both its neighbours measured, unless `largest` or `further` forbids it.

    Args:
        score: of a value; larger is better, and NaN is worst.
        first: the smallest of the values to start with.
        count: how many to start with, >= 1.
        ratio: of neighbours, > 1.
        largest: no value beyond it.
        further: at most so many values more.

    Returns:
        The score of each value that was measured, from the smallest on. Values are rounded to four digits.
    """

    def value(place: int) -> float:
        return float(f"{first * ratio**place:.4g}")

    last = count
    while last > 1 and value(last - 1) > largest * (1 + 1e-3):
        last -= 1
    scores = {place: _number(score(value(place))) for place in range(last)}
    for _ in range(further):
        top = best({place: scores[place] for place in sorted(scores)})
        missing = [place for place in (top - 1, top + 1) if place not in scores and value(place) <= largest * (1 + 1e-3)]
        if not missing:
            break
        scores[missing[0]] = _number(score(value(missing[0])))
    return {value(place): scores[place] for place in sorted(scores)}


def best(scores: dict[Any, float]) -> Any:
    """The key with the largest score, the smallest of equals."""
    return max(scores, key=lambda key: (scores[key], -key))


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score
