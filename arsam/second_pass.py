"""What the second pass of an ascent shares with the first: random numbers, statistics, and the gradients of others."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from arsam import watch
from arsam.ascent import gradients_aside
from arsam.randomness import Hook, Randomness, Recording, own_generators
from arsam.statistics import frozen_statistics


class SecondPass:
    """Makes the second pass the same function of the weights as the first.

    Args:
        model: whose statistics stand still and whose calls are listened to; None: not known.
        parameters: asks for those that the optimizer steps. A method, held weakly.
        wanted: asks whether the coming step may be an ascent, so that the model's calls are worth a record. Held weakly too.
        same_randomness: are the random numbers to be the same?
    """

    def __init__(
        self,
        model: nn.Module | None,
        parameters: Callable[[], list[Tensor]],
        wanted: Callable[[], bool],
        same_randomness: bool,
    ) -> None:
        self.model = model
        self.same_randomness = same_randomness
        self._parameters, self._wanted = weakref.WeakMethod(parameters), weakref.WeakMethod(wanted)
        self._generators = own_generators(model)
        self._recording = Recording()
        self._notes = watch.Notes()
        self._unannounced = False  # the loop perturbs on steps that are not due: every step is recorded
        self._looked = False  # for statistics that move outside of the model
        self._compiled = _frames_compiled()
        self._handle: Any = None
        if model is not None and same_randomness:
            with suppress(RuntimeError):  # a scripted module takes no hooks
                self._handle = model.register_forward_pre_hook(Hook(weakref.WeakMethod(self._called)), prepend=True)
                weakref.finalize(self, self._handle.remove).atexit = False

    def leave(self) -> None:
        """Listen to the model no longer."""
        if self._handle is not None:
            self._handle.remove()

    def randomness(self) -> Randomness | None:
        """The generators as they are; None where the passes may draw apart."""
        if not self.same_randomness:
            return None
        parameters = self._parameters()
        return Randomness({p.device for p in parameters()} if parameters is not None else (), self._generators)

    def forget(self) -> None:
        """A new step begins."""
        self._recording.forget()

    def _called(self, module: nn.Module) -> None:
        wanted = self._wanted()
        if wanted is not None:
            kind = torch.is_grad_enabled(), module.training
            self._recording.forward(kind, self.randomness if self._unannounced or wanted() else None)

    @contextmanager
    def run(self, before: Randomness | None) -> Generator[None]:
        """Inside is the second pass.

        Args:
            before: the generators before the first pass, where the whole of both passes is one closure. None: the model's
                calls draw what its calls in the first pass drew.
        """
        after = self.randomness()
        parameters = self._parameters()
        own = set(parameters()) if parameters is not None else set[Tensor]()
        others: list[Tensor] = [p for p in self.model.parameters() if p not in own] if self.model is not None else []
        moving: list[str] = []
        drew = False
        try:
            with ExitStack() as stack:
                stack.enter_context(gradients_aside(others))
                stack.enter_context(frozen_statistics(self.model))
                if not self._looked and _frames_compiled() == self._compiled:  # compiled code would be made anew for it
                    moving = stack.enter_context(watch.moving_statistics(self.model))
                if before is not None:
                    before.restore()
                else:
                    self._unannounced |= not self._recording
                    stack.enter_context(self._recording.replay(after))
                torch.clear_autocast_cache()  # or the pass would run on half-precision copies of w, not of w + e
                yield
                drew = before is None and self._recording.apart()
        finally:
            if after is not None:
                after.restore()
        self._looked = True
        known = watch.NO_MODEL if self.model is None else watch.PART_OF_MODEL
        if moving:
            self._notes.tell("statistics", watch.STATISTICS.format(", ".join(sorted(set(moving))), known))
        if drew:
            self._notes.tell("draws", watch.DRAWS.format(watch.NO_MODEL if self.model is None else watch.OTHER_MODEL))


def _frames_compiled() -> int:
    """How many frames torch.compile has compiled in this process, in which other code may have been compiled before."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return sum(dynamo.counters["frames"].values()) if dynamo is not None else 0
