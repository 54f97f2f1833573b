"""Running statistics that stand still while a perturbed model is evaluated.

The second pass of a sharpness-aware step sees weights that are never kept. What it would teach BatchNorm's running mean
or a quantization observer is wrong, and counts the batch twice.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy


@contextmanager
def frozen_statistics(model: nn.Module | None) -> Generator[None]:
    """No running statistic of the model moves inside; the outputs of training mode stay what they are.

    BatchNorm with all its subclasses (SyncBatchNorm, timm's BatchNormAct2d), tracking InstanceNorm, and fake-quant modules
    with torch's ``enable_observer`` / ``disable_observer`` are told to stand still. Whatever other buffer moves (timm's
    EvoNorm, spectral normalization, a queue), also in a module that the pass itself switches to training, is put back.
    Idempotent and nestable; undone on an exception too.

    Args:
        model: None does nothing.
    """
    changed: list[tuple[Any, str, Any]] = []
    observers: list[Any] = []
    buffers: list[_Buffer] = []
    for module in model.modules() if model is not None else ():
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            # Without tracking, training mode normalises by the batch as before and touches no buffer.
            changed.append((module, "track_running_stats", True))
            module.track_running_stats = False
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            # InstanceNorm passes its buffers on whatever it tracks, so here the update's weight is what vanishes.
            changed.append((module, "momentum", module.momentum))
            module.momentum = 0.0
        elif _observes(module):
            observers.append(module)
            module.disable_observer()  # pyright: ignore[reportCallIssue]
        else:
            buffers += [_Buffer(module, name) for name, b in module._buffers.items() if b is not None and not is_lazy(b)]
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        for module in observers:
            module.enable_observer()
        for buffer in buffers:
            buffer.put_back()


class _Buffer:
    """A buffer of a module with its value now."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.tensor: Any = module._buffers[name]
        self.value, self.version = self.tensor.detach().clone(), self.tensor._version

    def put_back(self) -> None:
        """The same tensor with the same value, if either has changed."""
        if self.tensor._version != self.version:
            with torch.no_grad():
                self.tensor.copy_(self.value)
        if self.module._buffers.get(self.name) is not self.tensor:
            self.module._buffers[self.name] = self.tensor


def _observes(module: nn.Module) -> bool:
    enabled = getattr(module, "observer_enabled", None)
    return enabled is not None and hasattr(module, "disable_observer") and bool(enabled[0])
