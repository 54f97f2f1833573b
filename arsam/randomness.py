"""The same random numbers in both passes.

The two passes of an ascent are one function of the weights: what dropout, drop path or MixUp drew in the first pass is drawn
again in the second, and afterwards the generators go on as if there had been one pass. Otherwise PSF = g_s - g would be
mostly the difference of two masks, and every step until the next ascent would be given that one draw.

Covered are torch's default generators of the CPU and of the devices in use, the `torch.Generator` objects that are attributes
of the model's modules, Python's `random` and, where numpy is loaded, its global generator. A generator that lives elsewhere
cannot be known.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Randomness:
    """The state of all generators at one moment.

    Args:
        devices: whose default generators count, beside the CPU's.
        generators: further ones, such as `own_generators` of a model.
    """

    def __init__(self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {d: _module(d).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")}
        self._generators = [(g, g.get_state()) for g in generators]
        self._python = random.getstate()
        self._numpy: Any = _numpy().get_state() if _numpy() is not None else None

    def restore(self) -> None:
        """Set all generators back to that moment."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            _module(device).set_rng_state(state, device)
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._python)
        if self._numpy is not None:
            _numpy().set_state(self._numpy)

    def moved(self) -> bool:
        """Have torch's default generators drawn since?"""
        return not torch.equal(self._cpu, torch.get_rng_state()) or any(
            not torch.equal(state, _module(device).get_rng_state(device)) for device, state in self._devices.items()
        )


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _numpy() -> Any:
    return getattr(sys.modules.get("numpy"), "random", None)


def own_generators(model: nn.Module | None) -> list[torch.Generator]:
    """The `torch.Generator` objects that are attributes of a model's modules."""
    values = [x for module in model.modules() for x in vars(module).values()] if model is not None else []
    return [x for x in values if isinstance(x, torch.Generator)]


class Recording:
    """The generators at each forward of the first pass, to be replayed in the second.

    In a loop that owns its backward there is no closure to wrap, so that the model's own calls are what the passes have in
    common: the n-th call of the second pass draws what the n-th of the first drew.
    """

    def __init__(self) -> None:
        self.recorded: list[Randomness] = []
        self._next: int | None = None  # the call that comes in the second pass; None outside of it

    def forward(self, snapshot: Callable[[], Randomness | None] | None) -> None:
        """The model is called; ``snapshot`` makes the record, None: none is wanted."""
        if self._next is not None:
            if self._next < len(self.recorded):
                self.recorded[self._next].restore()
            self._next += 1
        elif snapshot is not None and (made := snapshot()) is not None:
            self.recorded.append(made)

    def forget(self) -> None:
        """A new step begins."""
        self.recorded = []

    @contextmanager
    def replay(self) -> Generator[None]:
        """Inside, the model's calls are those of the second pass."""
        self._next = 0
        try:
            yield
        finally:
            self._next = None

    def replayed(self) -> bool:
        """Inside `replay`: has every call of the model been one of the first pass, and was there one?"""
        return self._next is not None and 0 < self._next <= len(self.recorded)


class Hook:
    """What a model holds of an optimizer: a forward pre-hook. Copies of the model do not take the optimizer along."""

    def __init__(self, called: weakref.WeakMethod[Callable[[nn.Module], None]] | None = None) -> None:
        self._called = called

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Pass the call on, unless the model is being compiled, or runs in evaluation without gradients."""
        if torch.compiler.is_compiling() or self._called is None or not (module.training or torch.is_grad_enabled()):
            return
        called = self._called()
        if called is not None:
            called(module)

    def __deepcopy__(self, _: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
