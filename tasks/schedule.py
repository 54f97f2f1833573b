"""Learning-rate schedules: closed-form factors of the learning rate, so that a resumed run needs no state.

Each is a function of the optimizer step t = 0, 1, ..., total_steps - 1.
"""

from __future__ import annotations

import functools
import math
from typing import Any


class Epochs(int):
    """A whole number of epochs, where steps are expected: the engine turns it into steps."""

    def __repr__(self) -> str:
        return f"Epochs({int(self)})"


def in_steps(value: Any, steps_per_epoch: int) -> Any:
    """Replace every `Epochs` in a partial's arguments, or in a tuple, by steps."""
    if isinstance(value, Epochs):
        return int(value) * steps_per_epoch
    if isinstance(value, tuple):
        return tuple(in_steps(v, steps_per_epoch) for v in value)
    if isinstance(value, functools.partial):
        keywords = {k: in_steps(v, steps_per_epoch) for k, v in value.keywords.items()}
        return functools.partial(value.func, *(in_steps(a, steps_per_epoch) for a in value.args), **keywords)
    return value


def _warmup(step: int, warmup: int, start: float) -> float:
    """From `start` on the first step to 1 on the last step of the warm-up, linearly; 1 afterwards."""
    return min(1.0, start + (1.0 - start) * step / max(warmup - 1, 1)) if step < warmup else 1.0


def cosine(step: int, total_steps: int, *, warmup: int = 0, start: float = 0.001, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `floor` (arXiv 1608.03983, eq. 5, without restarts).

    Args:
        step: t, from 0.
        total_steps: of the whole run.
        warmup: steps, or `Epochs`.
        start: factor on the first step of the warm-up.
        floor: factor after the last step.
    """
    if step < warmup:
        return _warmup(step, warmup, start)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def multistep(
    step: int, total_steps: int, *, milestones: tuple[int, ...], gamma: float = 0.1, warmup: int = 0, start: float = 0.001
) -> float:
    """Linear warm-up, and a factor of gamma at each milestone.

    Args:
        step: t, from 0.
        total_steps: not used; every schedule is called alike.
        milestones: steps, or `Epochs`.
        gamma: factor per milestone.
        warmup: steps, or `Epochs`.
        start: factor on the first step of the warm-up.
    """
    return _warmup(step, warmup, start) * gamma ** sum(step >= m for m in milestones)


FACTORS = (cosine, multistep)
