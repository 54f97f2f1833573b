"""Sampling rules that decide by the step number alone, and the protocol of all rules.

A sampling rule says on which steps the second pass, the ascent, is due. It answers `due` for the coming step, as often as
it is asked and without changing, and is told by `update` how the step went. Steps count from 0. Random rules draw U(0, 1)
as a function of (seed, step) alone: there is no generator to save, and ranks that share a seed decide alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor


class Sampling(Protocol):
    """What the optimizer asks of a sampling rule.

    Attributes:
        monitor: norms of the last so many parameter tensors are wanted after each ascent; 0: none.
        reads_gradient: does `due` look at the gradient of the first pass? Then `observe` is told its norm.
        learns: does `update` change what `due` answers? Such a rule has a history, and serves one optimizer.
    """

    monitor: int = 0
    reads_gradient: bool = False
    learns: bool = False

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Is an ascent due on this step? ``gradient_norm()`` gives ||g||_2 of the present gradient, 0-dim."""
        ...

    def observe(self, gradient_norm: Tensor) -> None:
        """||g||_2 of this step's own gradient, 0-dim: told once a step, before `update`, to a rule that reads gradients."""

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """The step is over; after an ascent of a monitoring rule, norms = (||g||, ||PSF||) of the monitored tensors."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...


def uniform(seed: int, step: int) -> float:
    """A draw of U(0, 1) that depends on (seed, step) alone."""
    return random.Random(f"{seed}:{step}").random()


class _Stateless(Sampling):
    """Shared by the rules that decide by the step number alone."""

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """Nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Always(_Stateless):
    """An ascent on every step: SAM."""

    spacing = 1.0

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Yes, on every step."""
        return True


class Never(_Stateless):
    """No ascents: the base optimizer."""

    spacing = math.inf

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """No, on no step."""
        return False


class Periodic(_Stateless):
    """An ascent on the steps t with t % every == offset.

    Args:
        every: period in steps, >= 1.
        offset: in [0, every).
    """

    def __init__(self, every: int, offset: int = 0) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}; for no ascents take sampling.Never()")
        if not 0 <= offset < every:
            raise ValueError(f"offset must lie in [0, every) = [0, {every}), got {offset}")
        self.every = every
        self.offset = offset

    @property
    def spacing(self) -> float:
        """Steps from one ascent to the next."""
        return self.every

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """t % every == offset."""
        return step % self.every == self.offset


class Bernoulli(_Stateless):
    """An ascent with probability p, independently on each step: SS-SAM, randomized sharpness-aware training.

    Args:
        p: in [0, 1].
        seed: of the draws; the same on every rank.
    """

    def __init__(self, p: float, seed: int = 0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        self.p = p
        self.seed = seed

    @property
    def spacing(self) -> float:
        """Mean steps from one ascent to the next."""
        return 1 / self.p if self.p else math.inf

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """U(seed, t) < p."""
        return uniform(self.seed, step) < self.p

    def state_dict(self) -> dict[str, Any]:
        """The seed: with it and the step the draws go on."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the saved draws."""
        self.seed = state["seed"]


class Tail(_Stateless):
    """Ascents on the last round(fraction * total_steps) steps: late-phase SAM (arXiv 2410.10373).

    Args:
        fraction: in [0, 1].
        total_steps: optimizer steps of the whole run, >= 1.
    """

    def __init__(self, fraction: float, total_steps: int) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self.fraction = fraction
        self.total_steps = total_steps

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """t >= total_steps - round(fraction * total_steps)."""
        return step >= self.total_steps - round(self.fraction * self.total_steps)


class Budget(_Stateless):
    """Evenly spaced ascents that come to a promised number of passes, however long the run.

    Of N ascents in M steps the n-th step ascends where n N mod M < N: at n = 0, then every M / N steps, rounded up, and so on
    with period M. Any n steps hold ceil(n N / M) ascents, so that the promise is met to within one step wherever a run stops.

    Args:
        passes_per_step: over the whole run, in [1, 2]: 1 is the base optimizer, 2 is SAM. N / M = passes_per_step - 1.
        total_steps: optimizer steps of the whole run, >= 1. Needed only for a warm-up that counts against the budget: of
            N = round((passes_per_step - 1) total_steps) ascents, those of the warm-up are taken off before the rest is spread.
        warmup: steps of full SAM at the start, >= 0. Without total_steps their ascents come on top of the budget.
    """

    def __init__(self, passes_per_step: float, total_steps: int | None = None, warmup: int = 0) -> None:
        if not 1 <= passes_per_step <= 2:
            raise ValueError(f"passes_per_step must lie in [1, 2], got {passes_per_step}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        if total_steps is None:
            rate = Fraction(passes_per_step - 1).limit_denominator(10_000)
            self._ascents, self._steps, most = rate.numerator, rate.denominator, math.inf
        else:
            most = round((passes_per_step - 1) * total_steps)
            self._ascents, self._steps = most - warmup, max(total_steps - warmup, 1)
        if not 0 <= warmup <= most:
            allowed = f"[0, {most}], the ascents that the budget allows" if total_steps is not None else "[0, inf)"
            raise ValueError(f"warmup must lie in {allowed}, got {warmup}")
        self.passes_per_step = passes_per_step
        self.total_steps = total_steps
        self.warmup = warmup

    @property
    def spacing(self) -> float:
        """Mean steps from one ascent to the next, after the warm-up."""
        return self._steps / self._ascents if self._ascents else math.inf

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Warm-up, or n N mod M < N."""
        n = step - self.warmup
        return n < 0 or n * self._ascents % self._steps < self._ascents
