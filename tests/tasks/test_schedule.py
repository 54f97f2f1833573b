"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from tasks import schedule


def test_schedules() -> None:
    """The ends, the warm-up and the milestones."""
    assert schedule.cosine(0, 100) == 1.0
    assert schedule.cosine(50, 100) == pytest.approx(0.5)
    assert schedule.cosine(100, 100, floor=0.1) == pytest.approx(0.1)
    assert [schedule.cosine(t, 100, warmup=3, start=0.2) for t in range(4)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    factors = [schedule.multistep(t, 100, milestones=(5, 8), gamma=0.1, warmup=2, start=0.5) for t in (0, 1, 4, 5, 7, 8)]
    assert factors == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01])
