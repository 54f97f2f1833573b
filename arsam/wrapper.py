"""An optimizer around another one, as torch.optim sees it: groups, state, hooks, pickles. No method of training is here."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from arsam import saving


class Wrapper(Optimizer):
    """An optimizer whose groups and state are its base's own.

    A subclass gives the step itself, `_step`. torch's global hooks and those that are registered here run around it, once each
    and in torch's order; those of the base run around the base's step.
    """

    base: Optimizer
    defaults: dict[str, Any]
    # Attributes of this process alone, which no copy or pickle takes along; beside torch's tables of hooks.
    _transient: tuple[str, ...] = ("_zero_grad_profile_name", "step", "found_inf", "grad_scale")

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's own groups, each with "sam_rho" and "sam_adaptive"."""
        groups = self.base.param_groups
        return saving.names_of_groups(groups) if saving.unflattening(sys._getframe(1)) else groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's own state."""
        state = self.base.state
        return saving.names_of_state(state, self._parameters()) if saving.unflattening(sys._getframe(1)) else state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def _patch_step_function(self) -> None:
        # torch would wrap the step of every class, so that a subclass that calls its parent's runs all hooks twice.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        raise NotImplementedError

    def _hooked_step(self, closure: Callable[[], Any] | None) -> Any:
        """`_step` between the hooks."""
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for hook in chain(list(_global_optimizer_pre_hooks.values()), self._optimizer_step_pre_hooks.values()):
            result: Any = hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
                closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            loss = self._step(closure)
        for hook in chain(self._optimizer_step_post_hooks.values(), list(_global_optimizer_post_hooks.values())):
            hook(self, args, kwargs)
        return loss

    def _step_base(self) -> None:
        """Step each base, with its own hooks and without torch's global ones, which run around this optimizer.

        The pre-hooks are run here, since torch would take the norm that a clipping hook returns for arguments of the step.
        """
        for base in bases_of(self.base):
            args: tuple[Any, ...] = (base,)
            kwargs: dict[str, Any] = {}
            for hook in list(base._optimizer_step_pre_hooks.values()):
                result = hook(base, args, kwargs)
                if isinstance(result, tuple):
                    args, kwargs = result
            hooks = base._optimizer_step_pre_hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks
            with _aside(hooks[0]), _aside(hooks[1]), _aside(hooks[2]):
                base.step(*args[1:], **kwargs)

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict with one entry more, "arsam": containers, numbers and tensors only."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self._state()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bitwise from a `state_dict`.

        Raises:
            ValueError: the state is a plain optimizer's, or was made with other sampling or reuse rules, or other settings.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def train(self) -> None:
        """Pass the call on to a base that has a training mode (schedule-free optimizers); else nothing."""
        self._call_base("train")

    def eval(self) -> None:
        """Pass the call on to a base that has an evaluation mode (schedule-free optimizers); else nothing."""
        self._call_base("eval")

    def _call_base(self, name: str) -> None:
        for base in bases_of(self.base):
            method = getattr(base, name, None)
            if callable(method):
                method()

    def __getstate__(self) -> dict[str, Any]:
        names = [n for n in self.__dict__ if n not in self._transient and not n.startswith("_optimizer_")]
        return {name: self.__dict__[name] for name in names}


@contextmanager
def _aside(hooks: dict[int, Any]) -> Generator[None]:
    held = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(held)


class Several(Optimizer):
    """Optimizers over disjoint parameters as one: their groups one after another, one step, one state.

    Args:
        bases: in the order in which they step, at least one.

    Raises:
        ValueError: a parameter is in two of them.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        # Without Optimizer.__init__, which would make groups and state of its own.
        self.bases = list(bases)
        self.defaults: dict[str, Any] = {}
        seen: set[Tensor] = set()
        for base in self.bases:
            own = {p for group in base.param_groups for p in group["params"]}
            if not seen.isdisjoint(own):
                raise ValueError(f"{type(base).__name__} has a parameter that an optimizer before it in the list has too")
            seen |= own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups of all; the dictionaries are the bases' own."""
        return [group for base in self.bases for group in base.param_groups]

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The state of all, to read; the entries are the bases' own."""
        return {p: entry for base in self.bases for p, entry in base.state.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: nobody could know to which of the optimizers.

        Raises:
            TypeError: always.
        """
        raise TypeError("several base optimizers: call add_param_group of the one that shall have the group")

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step each of them."""
        for base in self.bases:
            base.step()

    def state_dict(self) -> dict[str, Any]:
        """One state_dict in torch's form, parameters numbered through."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for base in self.bases:
            own = base.state_dict()
            state |= {i + start if isinstance(i, int) else i: entry for i, entry in own["state"].items()}
            groups += [{**group, "params": [i + start for i in group["params"]]} for group in own["param_groups"]]
            start += sum(len(group["params"]) for group in base.param_groups)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its part of a `state_dict`.

        Raises:
            ValueError: it has another number of groups.
        """
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} parameter groups, the optimizers have {len(self.param_groups)}")
        for base in self.bases:
            own, groups = groups[: len(base.param_groups)], groups[len(base.param_groups) :]
            names = {name for group in own for name in group["params"]}
            state = {name: entry for name, entry in state_dict["state"].items() if name in names}
            base.load_state_dict({"state": state, "param_groups": own})

    def _patch_step_function(self) -> None:
        # The bases have the hooks.
        self._zero_grad_profile_name = "Optimizer.zero_grad#Several.zero_grad"

    def __getstate__(self) -> dict[str, Any]:
        return {"bases": self.bases, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def bases_of(base: Optimizer) -> list[Optimizer]:
    """The optimizers that step the weights: those of a `Several`, or the one."""
    return base.bases if isinstance(base, Several) else [base]
