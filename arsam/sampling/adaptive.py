"""The sampling rule that was published for vSAM, and that ARSAM takes over."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from arsam.sampling.rules import Sampling, uniform


class Adaptive(Sampling):
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

    learns = True

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
        self.max_rate = max_rate
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
        return left >= self.window - n % self.window or (left > 0 and uniform(self.seed, step) < self._rate / self.window)

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
