"""One step: its passes, in the config's precision and micro-batches, clipped; and what becomes of a NaN.

An accelerator works behind the process that feeds it, and whoever reads a number from it waits. A run therefore looks for
NaN and inf now and then (`Step.sound`), not on each pass. If it finds one it goes back to its last checkpoint and looks at
each pass from there on: a pass that gives a NaN or an inf leaves its step out, so that neither weights nor averages nor
running statistics take it in. The weights are to the bit those of a run that had looked at each pass from the beginning.
"""

# torch's foreach functions are public by use, underscore and all
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from arsam import ARSAM, functional, scaled_step
from tasks import distributed
from tasks.config import Config
from tasks.errors import UserError
from tasks.state import State
from tasks.task import Batch


class NotFiniteError(Exception):
    """A pass gave a NaN or an inf, in the loss or in a gradient."""


class Step:
    """Take one step after another.

    Args:
        config: of the run.
        state: what the steps change.
    """

    def __init__(self, config: Config, state: State) -> None:
        self._config = config
        self._state = state
        self._scaled = state.scaler.is_enabled()
        self._careful = state.progress.skipped > 0  # each pass is looked at
        self._statistics: list[Tensor] = []
        self._updated = True  # the base optimizer took the last step; a loss scale in search leaves some out
        base: Optimizer = state.optimizer.base if isinstance(state.optimizer, ARSAM) else state.optimizer
        if base is not state.optimizer or self._scaled:
            # The passes of an ascent must not be clipped one by one: that would bend their difference. The base sees the
            # mixed gradient, and the unscaled one.
            base.register_step_pre_hook(self._before_update)
        self.whole = True  # the state is that of a whole number of steps
        self._passing = False
        self._first = True  # what is wrong with an optimizer, or with the state it was given, shows now
        self._clips_passes = base is state.optimizer and not self._scaled

    def __call__(self, batch: Batch) -> None:
        """Update the weights once, or leave the step out."""
        state, progress = self._state, self._state.progress
        self._batch = {name: value.to(state.device, non_blocking=True) for name, value in batch.items()}
        if self._careful or self._scaled:
            self._keep_statistics()
        self.whole = False
        try:
            state.loss_sum += self._update()
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            if not self._first or self._passing or isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
            if progress.step:
                raise UserError(f"the checkpoint is not that of a run of this version: {what}") from error
            raise UserError(f"optimizer: cannot take a step: {what}") from error
        except NotFiniteError:
            functional.copy_(list(state.model.buffers()), self._statistics)
            progress.skip()
        else:
            progress.skipped_in_a_row = 0
            if state.average is not None:
                state.average.update(state.model)
        progress.step += 1
        self.whole, self._first = True, False

    def sound(self) -> bool:
        """Look for NaN and inf in losses, weights and optimizer; after False each pass is looked at by itself.

        False says that the steps since the last checkpoint are spoilt: the caller goes back there.
        """
        if self._careful or self._scaled:
            return True
        state = self._state
        numbers = [p.detach() for p in state.model.parameters()] + floats(list(state.optimizer.state.values()))
        largest = [x.to(state.device) for x in torch._foreach_norm([x for x in numbers if x.numel()], math.inf)]
        (self._careful,) = distributed.anywhere(
            not math.isfinite(torch.stack([state.loss_sum, *(x.double() for x in largest)]).sum())
        )
        return not self._careful

    def _update(self) -> Tensor:
        """A step with the kind of closure that the precision needs; the loss."""
        if not self._scaled:
            return self._state.optimizer.step(self._pass)  # type: ignore[return-value]
        self._updated = False
        loss = scaled_step(self._state.optimizer, self._pass, self._state.scaler)
        if not self._updated:
            raise NotFiniteError
        return loss

    def _pass(self) -> Tensor:
        """Zero the gradients, run forward and backward: the closure."""
        state = self._state
        self._passing = True
        state.optimizer.zero_grad()
        loss = self._forward_backward()
        state.progress.passes += 1
        state.progress.epoch_passes += 1
        if self._careful and not self._scaled:  # a loss scale looks for infs itself
            self._check(loss)
        if self._clips_passes:
            self._clip()
        self._passing = False
        return loss

    def _forward_backward(self) -> Tensor:
        """One pass over the batch, in micro-batches whose gradients add up; the mean loss."""
        if self._config.accumulate == 1:
            return self._part(self._batch, 1.0)
        sizes = [len(part) for part in next(iter(self._batch.values())).chunk(self._config.accumulate)]
        values = zip(*(value.split(sizes) for value in self._batch.values()), strict=True)
        parts = [dict(zip(self._batch, part, strict=True)) for part in values]
        model: Any = self._state.trained
        losses: list[Tensor] = []
        for size, part in zip(sizes, parts, strict=True):
            # The processes' gradients are averaged once, after the last part.
            early = len(losses) + 1 < len(parts)
            with model.no_sync() if early and isinstance(model, DistributedDataParallel) else nullcontext():
                losses.append(self._part(part, size / sum(sizes)))
        return torch.stack(losses).sum()

    def _part(self, part: Batch, share: float) -> Tensor:
        with autocast(self._config, self._state.device):
            loss = self._config.task.loss(self._state.trained, part)
        if share != 1.0:
            loss = loss * share
        scaled: Any = self._state.scaler.scale(loss)
        scaled.backward()
        return loss.detach()

    def _check(self, loss: Tensor) -> None:
        gradients = [p.grad for p in self._state.model.parameters() if p.grad is not None]
        if any(distributed.anywhere(not math.isfinite(functional.global_norm(gradients) + 0 * loss))):
            raise NotFiniteError

    def _keep_statistics(self) -> None:
        """A copy of the running statistics, in one move: a step that is left out puts them back."""
        buffers = list(self._state.model.buffers())
        if len(self._statistics) != len(buffers):
            self._statistics = [buffer.clone() for buffer in buffers]
        else:
            functional.copy_(self._statistics, buffers)

    def _before_update(self, *_: Any) -> None:
        self._updated = True
        self._clip()

    def _clip(self) -> None:
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._state.model.parameters(), self._config.clip_norm)


def autocast(config: Config, device: torch.device) -> Any:
    """The context in which the model computes in the config's precision."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if config.precision == "fp16" else torch.bfloat16)


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [x for part in value.values() for x in floats(part)]
    return [x for part in value for x in floats(part)] if isinstance(value, (list, tuple)) else []
