"""What paired runs allow to be said: intervals, better or worse, not worse by a margin, with Holm's correction.

# d_i the difference of two rows on seed i, n seeds
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
MARGIN = 0.01  # of accuracy; the margin is this or a quarter of SAM's gain, the smaller


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN from one value."""
    from scipy.stats import t

    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def margin(gains: Sequence[float]) -> float | None:
    """How much below SAM counts as no worse: one point, or a quarter of SAM's gain, the smaller.

    Args:
        gains: SAM minus base, seed by seed.

    Returns:
        None where SAM does not gain: then it is no standard to be held against.
    """
    mean, half = interval(gains)
    return min(MARGIN, mean / 4) if mean - (0.0 if math.isnan(half) else half) > 0 else None


@dataclass(frozen=True)
class Paired:
    """The difference of two rows, seed by seed.

    Args:
        mean: of d_i.
        half: of its 95 % interval.
        n: seeds.
        different: p of "no difference", two-sided t-test.
        inferior: p of "worse by the margin or more", one-sided; None: without a margin.
    """

    mean: float
    half: float
    n: int
    different: float
    inferior: float | None


def paired(differences: Sequence[float], margin: float | None = None) -> Paired:
    """Student's t on the differences; two of them at least."""
    from scipy.stats import t

    mean, half = interval(differences)
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)

    def tail(value: float) -> float:
        """P(T >= value / error), of n - 1 degrees of freedom."""
        return float(t.sf(value / error, n - 1)) if error > 0 else (0.5 if value == 0 else float(value < 0))

    inferior = None if margin is None else tail(mean + margin)
    return Paired(mean, half, n, 2 * tail(abs(mean)) if mean else 1.0, inferior)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm: the k-th smallest of m times m - k + 1, never below the one before, at most 1."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def words(family: Sequence[Paired]) -> list[str]:
    """What each of a family of differences allows to be said, with all of the family's tests corrected together.

    "better" or "worse": the difference is not 0. "not worse": it is not below -margin. Else "no difference found", which is
    no claim of equality.
    """
    tests = [(i, name, p) for i, d in enumerate(family) for name, p in (("d", d.different), ("i", d.inferior)) if p is not None]
    adjusted = {(i, name): p for (i, name, _), p in zip(tests, holm([p for *_, p in tests]), strict=True)}
    said: list[str] = []
    for i, difference in enumerate(family):
        if adjusted[i, "d"] < LEVEL:
            said.append("better" if difference.mean > 0 else "worse")
        elif adjusted.get((i, "i"), 1.0) < LEVEL:
            said.append("not worse")
        else:
            said.append("no difference found")
    return said
