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

Kind = tuple[bool, bool]  # of a call: are gradients on, is the model in training mode?


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
        """Has a generator that is not a module's own drawn since?"""
        if self._python != random.getstate() or not torch.equal(self._cpu, torch.get_rng_state()):
            return True
        if self._numpy is not None and str(self._numpy) != str(_numpy().get_state()):
            return True
        return any(not torch.equal(state, _module(device).get_rng_state(device)) for device, state in self._devices.items())


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
    common: the n-th call of the second pass draws what the n-th of the first drew. Calls without gradients (a teacher, a
    metric) and calls in evaluation mode are counted by themselves, for a pass may leave them out.
    """

    def __init__(self) -> None:
        self._recorded: dict[Kind, list[Randomness]] = {}
        self._calls: dict[Kind, int] | None = None  # of the second pass so far; None outside of it
        self._entered: Randomness | None = None  # the generators when it began
        self._strayed = False  # it drew before it called the model

    def __bool__(self) -> bool:
        """Has a call of the first pass been recorded?"""
        return any(self._recorded.values())

    def forward(self, kind: Kind, snapshot: Callable[[], Randomness | None] | None) -> None:
        """The model is called; ``snapshot`` makes the record, None: none is wanted."""
        own = self._recorded.setdefault(kind, [])
        if self._calls is not None:
            self._strayed |= not self._calls and self._entered is not None and self._entered.moved()
            count = self._calls.get(kind, 0)
            if count < len(own):
                own[count].restore()
            self._calls[kind] = count + 1
        elif snapshot is not None and (made := snapshot()) is not None:
            own.append(made)

    def forget(self) -> None:
        """A new step begins."""
        self._recorded = {}

    @contextmanager
    def replay(self, entered: Randomness | None) -> Generator[None]:
        """Inside, the model's calls are those of the second pass, before which the generators were as in ``entered``."""
        self._calls, self._entered, self._strayed = {}, entered, False
        try:
            yield
        finally:
            self._calls = self._entered = None

    def apart(self) -> bool:
        """Inside `replay`: has the second pass drawn numbers that are not those of the first?

        So it has if it drew before it called the model, or if it drew and the model was not called as in the first pass: not
        at all, more often, or with gradients less often.
        """
        if self._strayed:
            return True
        if self._entered is None or not self._entered.moved():
            return False
        counts = {kind: len(calls) for kind, calls in self._recorded.items()}
        calls = self._calls or {}
        return not calls or any(n > counts[kind] or (kind[0] and n < counts[kind]) for kind, n in calls.items())


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
