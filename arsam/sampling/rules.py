"""Sampling rules: on which steps the second pass, the ascent, is due.

A rule answers `due` for the coming step, as often as it is asked and without changing, and is told by `update` how the
step went. Steps count from 0. Random rules draw U(0, 1) as a function of (seed, step) alone: there is no generator to
save, and ranks that share a seed decide alike.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class Sampling(Protocol):
    """What the optimizer asks of a sampling rule."""

    @property
    def monitor(self) -> int:
        """Norms of the last so many parameter tensors are wanted after each ascent; 0: none."""
        ...

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Is an ascent due on this step? ``gradient_norm()`` gives ||g||_2 of the present gradient, 0-dim."""
        ...

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """The step is over; after an ascent of a monitoring rule, norms = (||g||, ||PSF||) of the monitored tensors."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...


def _uniform(seed: int, step: int) -> float:
    return random.Random(f"{seed}:{step}").random()


class _Stateless:
    """Shared by the rules that decide by the step number alone."""

    monitor = 0

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """Nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Always(_Stateless):
    """An ascent on every step: SAM."""

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """True."""
        return True


class Never(_Stateless):
    """No ascents: the base optimizer."""

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """False."""
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
        """T % every == offset."""
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
        return _uniform(self.seed, step) < self.p

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
        """T >= total_steps - round(fraction * total_steps)."""
        return step >= self.total_steps - round(self.fraction * self.total_steps)


class Budget(_Stateless):
    """Evenly spaced ascents that come to a promised number of passes: round((passes_per_step - 1) total_steps) ascents.

    With N of them left after the warm-up, over M steps, the n-th of these steps ascends where n N mod M < N: at n = 0, then
    every M / N steps, rounded up. Any n of them hold ceil(n N / M) ascents, so that the promise is met to within one step
    wherever a run stops.

    Args:
        passes_per_step: over the whole run, warm-up included, in [1, 2]: 1 is the base optimizer, 2 is SAM.
        total_steps: optimizer steps of the whole run, >= 1.
        warmup: steps of full SAM at the start, >= 0; their ascents count.
    """

    def __init__(self, passes_per_step: float, total_steps: int, warmup: int = 0) -> None:
        if not 1 <= passes_per_step <= 2:
            raise ValueError(f"passes_per_step must lie in [1, 2], got {passes_per_step}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        ascents = round((passes_per_step - 1) * total_steps)
        if not 0 <= warmup <= ascents:
            raise ValueError(f"warmup must lie in [0, {ascents}], the ascents that the budget allows, got {warmup}")
        self.warmup = warmup
        self._ascents = ascents - warmup
        self._steps = max(total_steps - warmup, 1)

    @property
    def spacing(self) -> float:
        """Mean steps from one ascent to the next, after the warm-up."""
        return self._steps / self._ascents if self._ascents else math.inf

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Warm-up, or n N mod M < N."""
        n = step - self.warmup
        return n < 0 or n * self._ascents % self._steps < self._ascents


class GradientNorm:
    """AE-SAM: an ascent when ||g||^2 >= mu + c sigma, c ramped from lambda1 to lambda2 (arXiv 2304.14647).

    mu <- 0.9 mu + 0.1 ||g||^2 and sigma^2 <- 0.9 sigma^2 + 0.1 (||g||^2 - mu)^2 take in the present gradient before the
    comparison, and c = lambda1 + (lambda2 - lambda1) t / total_steps. The rule reads the gradient of the first pass, so
    `ARSAM.due` means something only after the backward pass, and every step waits for the device once.

    Args:
        lambda1: threshold in standard deviations at the first step; the larger, the fewer ascents.
        lambda2: the same at the last step.
        total_steps: optimizer steps of the whole run, >= 1.
    """

    monitor = 0
    _DECAY = 0.9

    def __init__(self, lambda1: float, lambda2: float, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self.total_steps = total_steps
        self._moments = self._candidate = (0.0, 0.0)  # mu, sigma^2: settled, and with the present gradient taken in

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """||g||^2 >= mu + c sigma."""
        mean, variance = self._moments
        square = float(gradient_norm()) ** 2
        mean = self._DECAY * mean + (1 - self._DECAY) * square
        variance = self._DECAY * variance + (1 - self._DECAY) * (square - mean) ** 2
        self._candidate = (mean, variance)
        threshold = self.lambda1 + (self.lambda2 - self.lambda1) * min(step / self.total_steps, 1.0)
        return square >= mean + threshold * math.sqrt(variance)

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """Settle the running averages with the gradient that `due` saw last."""
        self._moments = self._candidate

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {"moments": list(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved averages."""
        mean, variance = state["moments"]
        self._moments = self._candidate = (mean, variance)


class Adaptive:
    """The rule published for vSAM and taken for ARSAM: S ascents per window, S following the PSF's statistics.

    Each window of K steps has exactly floor(S) ascents at random places. At a window's end, once K ratios
    q = ||PSF|| / ||g|| and K variances V are on record,

        S <- clip(S (1 + alpha1 d(q) + alpha2 d(V)), 1, floor(max_rate K)),   d(x) = clip(mean_i (x_{i+1} - x_i) / x_i, -1, 1)

    where V is the mean unbiased variance inside the blocks of the sorted last K values of ||PSF||.

    For noise around a constant, mean (x' - x) / x is above 0, so the published S climbs to its cap even when nothing
    changes: alpha is in effect the speed knob. ``estimator="log"`` takes the mean log-ratio, which does not drift.

    Args:
        window: K, steps per window.
        blocks: blocks that the sorted norms are cut into; window >= 2 blocks.
        max_rate: cap of S / K, in (0, 1].
        alpha: (alpha1, alpha2), gains of the ratio's and the variance's trend, >= 0.
        initial: S of the first windows, in [1, floor(max_rate K)].
        warmup: steps of full SAM before the first window, >= 0.
        monitor: the norms are taken over the last so many parameter tensors, counted over all groups in order, >= 1.
        estimator: "ratio" as published, or "log".
        seed: of the draws; the same on every rank.

    References:
        arXiv 2403.08821, section 3; arXiv 2510.03763.
    """

    def __init__(
        self,
        window: int = 50,
        blocks: int = 5,
        max_rate: float = 0.8,
        alpha: tuple[float, float] = (0.13, 0.13),
        initial: float = 1.0,
        warmup: int = 0,
        monitor: int = 10,
        estimator: Literal["ratio", "log"] = "ratio",
        seed: int = 0,
    ) -> None:
        if blocks < 1 or window < 2 * blocks:
            raise ValueError(f"window must be >= 2 * blocks and blocks >= 1, got window={window}, blocks={blocks}")
        if not 0 < max_rate <= 1 or math.floor(max_rate * window) < 1:
            raise ValueError(f"max_rate must lie in (0, 1] and allow one ascent per window of {window}, got {max_rate}")
        if len(alpha) != 2 or min(alpha) < 0:
            raise ValueError(f"alpha must be two gains >= 0, got {alpha}")
        self.cap = math.floor(max_rate * window)
        if not 1 <= initial <= self.cap:
            raise ValueError(f"initial must lie in [1, floor(max_rate * window)] = [1, {self.cap}], got {initial}")
        if warmup < 0:
            raise ValueError(f"warmup must be >= 0 steps, got {warmup}")
        if monitor < 1:
            raise ValueError(f"monitor must be >= 1, got {monitor}")
        if estimator not in ("ratio", "log"):
            raise ValueError(f'estimator must be "ratio" or "log", got {estimator!r}')
        self.window = window
        self.blocks = blocks
        self.alpha = alpha
        self.warmup = warmup
        self.monitor = monitor
        self.estimator = estimator
        self.seed = seed
        self._rate = float(initial)
        self._count = 0  # ascents done in this window
        self._unread: list[Tensor] = []  # (||g||, ||PSF||) of ascents, still on the device
        self._psf: deque[float] = deque(maxlen=window)
        self._ratio: deque[float] = deque(maxlen=window)
        self._variance: deque[float] = deque(maxlen=window)

    @property
    def rate(self) -> float:
        """S, the ascents aimed at per window."""
        return self._rate

    @property
    def spacing(self) -> float:
        """Mean steps from one ascent to the next, at the present S."""
        return self.window / math.floor(self._rate)

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """Warm-up, or a random draw while the window's quota lasts, or the last chance to meet it."""
        n = step - self.warmup
        if n < 0:
            return True
        left = math.floor(self._rate) - self._count
        return left >= self.window - n % self.window or (left > 0 and _uniform(self.seed, step) < self._rate / self.window)

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """Count the ascent and queue its norms; after a window's last step, set S."""
        n = step - self.warmup
        if ascended and n >= 0:
            self._count += 1
        if norms is not None:
            self._unread.append(torch.stack(norms))
        window_ends = n >= 0 and (n + 1) % self.window == 0
        if window_ends or len(self._unread) == self.window:
            self._read()
        if window_ends:
            self._count = 0
            if len(self._ratio) == len(self._variance) == self.window:
                change = self.alpha[0] * self._trend(self._ratio) + self.alpha[1] * self._trend(self._variance)
                self._rate = min(max(self._rate * (1 + change), 1.0), float(self.cap))

    def _read(self) -> None:
        """Bring the queued norms to the host, all in one copy, and record them."""
        if not self._unread:
            return
        rows: list[list[float]] = torch.stack(self._unread).double().tolist()  # pyright: ignore
        self._unread.clear()
        for gradient, psf in rows:
            if not (math.isfinite(gradient) and math.isfinite(psf)):
                continue  # a diverged step says nothing about the trend
            self._psf.append(psf)
            self._ratio.append(psf / gradient if gradient > 0 else 0.0)
            if len(self._psf) == self.window:
                self._variance.append(_block_variance(self._psf, self.blocks))

    def _trend(self, values: Sequence[float]) -> float:
        pairs = zip(values, list(values)[1:], strict=False)
        if self.estimator == "log":
            changes = [math.log(y / x) if x > 0 and y > 0 else 0.0 for x, y in pairs]
        else:
            changes = [(y - x) / x if x != 0 else 0.0 for x, y in pairs]
        return min(max(sum(changes) / len(changes), -1.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """S, the count, the queues and the seed."""
        self._read()
        return {
            "rate": self._rate,
            "count": self._count,
            "psf": list(self._psf),
            "ratio": list(self._ratio),
            "variance": list(self._variance),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._rate, self._count, self.seed = state["rate"], state["count"], state["seed"]
        self._unread = []
        for name, queue in (("psf", self._psf), ("ratio", self._ratio), ("variance", self._variance)):
            queue.clear()
            queue.extend(state[name])


def _block_variance(values: Sequence[float], blocks: int) -> float:
    """Mean unbiased variance of the blocks of the sorted values, cut from the small end; a remainder is left out."""
    ordered = sorted(values)
    size = len(ordered) // blocks
    variances: list[float] = []
    for start in range(0, size * blocks, size):
        block = ordered[start : start + size]
        mean = sum(block) / size
        variances.append(sum((x - mean) ** 2 for x in block) / (size - 1))
    return sum(variances) / blocks
