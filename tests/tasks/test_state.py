"""What a run changes: how it is built, and that a checkpoint has all of it."""

from __future__ import annotations

import dataclasses
from functools import partial

from arsam import ARSAM, reuse, sampling
from tasks import state
from tests.tasks import toy


def test_total_steps_reach_the_rules() -> None:
    """Tail and GradientNorm are given the run's length, warm-ups in epochs become steps, reuse is built."""
    for rule in (partial(sampling.Tail, 0.2), partial(sampling.GradientNorm, 1, -1)):
        config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, sampling=rule))  # type: ignore[arg-type]
        optimizer = state.build_optimizer(config, config.task.build(), 7)
        assert optimizer.sampling.total_steps == 35  # type: ignore[attr-defined]
    optimizer = state.build_optimizer(toy.config, toy.config.task.build(), 7)
    assert optimizer.sampling.warmup == 7  # type: ignore[attr-defined]
    config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, reuse=partial(reuse.Decayed, horizon=9)))  # type: ignore[arg-type]
    assert state.build_optimizer(config, config.task.build(), 7).reuse.horizon == 9  # type: ignore[attr-defined]
