"""A search on a ladder."""

from __future__ import annotations

import itertools
import math

import pytest

from tasks import search


@pytest.mark.parametrize(("peak", "found"), [(0.1, 0.1), (0.4, 0.4), (0.03, 0.035), (50.0, 1.6)])
def test_the_best_lies_inside(peak: float, found: float) -> None:
    """With both neighbours measured. Kills: a search that stops at the edge, one that never stops."""
    scores = search.climb(lambda x: -abs(math.log(x / peak)), 0.1, 3, further=6)
    best = search.best(scores)
    assert best == pytest.approx(found, rel=0.2)
    assert len(scores) <= 9 and list(scores) == sorted(scores)
    if peak < 50:
        assert min(scores) < best < max(scores)
    values = list(scores)
    assert all(b / a == pytest.approx(2**0.5, rel=1e-3) for a, b in itertools.pairwise(values)), "no gap"


def test_ties_limits_and_nan() -> None:
    """The smallest of equals, nothing beyond the largest, NaN never. Kills: each of them."""
    assert search.best({1.0: 0.5, 2.0: 0.5}) == 1.0
    tried: list[float] = []
    scores = search.climb(lambda x: tried.append(x) or x, 0.5, 3, largest=1.0)
    assert max(scores) == 1.0 == search.best(scores) and len(tried) == len(set(tried))
    scores = search.climb(lambda x: math.nan if x > 0.6 else x, 0.5, 2)
    assert search.best(scores) == 0.5
