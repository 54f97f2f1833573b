"""AE-SAM's sampling rule: an ascent where the gradient is large for its time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from arsam.sampling.rules import Sampling


class GradientNorm(Sampling):
    """AE-SAM: an ascent when ||g||^2 >= mu + c sigma, c ramped from lambda1 to lambda2 (arXiv 2304.14647).

    mu <- 0.9 mu + 0.1 ||g||^2 and sigma^2 <- 0.9 sigma^2 + 0.1 (||g||^2 - mu)^2 take in the present gradient before the
    comparison, and c = lambda1 + (lambda2 - lambda1) t / total_steps. The rule reads the gradient of the first pass, so
    `ARSAM.due` means something only after the backward pass, and every step waits for the device once.

    Args:
        lambda1: threshold in standard deviations at the first step; the larger, the fewer ascents.
        lambda2: the same at the last step.
        total_steps: optimizer steps of the whole run, >= 1.
    """

    reads_gradient = True
    learns = True
    _DECAY = 0.9

    def __init__(self, lambda1: float, lambda2: float, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self.total_steps = total_steps
        self._moments = (0.0, 0.0)  # mu and sigma^2 of the steps that are over
        self._square = 0.0  # ||g||^2 of the step that is not

    def due(self, step: int, gradient_norm: Callable[[], Tensor]) -> bool:
        """||g||^2 >= mu + c sigma."""
        square = float(gradient_norm()) ** 2
        mean, variance = self._taken_in(square)
        threshold = self.lambda1 + (self.lambda2 - self.lambda1) * min(step / self.total_steps, 1.0)
        return square >= mean + threshold * math.sqrt(variance)

    def _taken_in(self, square: float) -> tuple[float, float]:
        mean, variance = self._moments
        mean = self._DECAY * mean + (1 - self._DECAY) * square
        return mean, self._DECAY * variance + (1 - self._DECAY) * (square - mean) ** 2

    def observe(self, gradient_norm: Tensor) -> None:
        """Remember ||g||^2 for `update`."""
        self._square = float(gradient_norm) ** 2

    def update(self, step: int, ascended: bool, norms: tuple[Tensor, Tensor] | None) -> None:
        """mu, sigma^2 <- with the gradient of this step taken in."""
        self._moments = self._taken_in(self._square)

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {"moments": list(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved averages."""
        mean, variance = state["moments"]
        self._moments = (mean, variance)
