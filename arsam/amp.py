"""Mixed precision: a sharpness-aware step under torch.amp.GradScaler."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from arsam.optimizer import ARSAM


def scaled_step(optimizer: Optimizer, closure: Callable[[], Any], scaler: GradScaler) -> Any:
    """One step with loss scaling, for any optimizer: the passes, ``scaler.step`` and ``scaler.update``.

    An inf or NaN in either pass leaves the whole step out, as without ARSAM, and lowers the scale.

    Example:
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     with torch.autocast("cuda", torch.float16):
        ...         loss = criterion(model(inputs), targets)
        ...     scaler.scale(loss).backward()
        ...     return loss
        >>> loss = scaled_step(optimizer, closure, scaler)

    Args:
        optimizer: an ARSAM, whose closure runs twice when an ascent is due, or any other, whose closure runs once.
        closure: zeroes the gradients, runs forward, ``scaler.scale(loss).backward()``, and returns the unscaled loss.
        scaler: of the loop.

    Returns:
        The loss of the first pass.
    """
    loss = optimizer._passes(closure, scaler.get_scale) if isinstance(optimizer, ARSAM) else closure()
    scaler.step(optimizer)
    scaler.update()
    return loss
