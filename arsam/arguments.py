"""What an ARSAM may be built of: its base, its numbers, its rules."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import gc
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from arsam import distributed, functional
from arsam.reuse import Decayed, Reuse
from arsam.sampling import Budget, Sampling
from arsam.wrapper import Several, Wrapper

_P = ParamSpec("_P")
# Rules with a history, by identity, and the optimizer that each serves.
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def base_first(init: Callable[_P, None]) -> Callable[_P, None]:
    """Look at the base before anything else: another package's SAM takes arguments that are unknown here."""

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if len(args) > 1:
            checked_base(args[1])
        init(*args, **kwargs)

    return checked


def checked_base(base: Any) -> Optimizer:
    """The base optimizer, or several as one.

    Raises:
        TypeError: it is none, or cannot take the gradients of two passes.
        ValueError: a parameter is in two of several.
    """
    several = isinstance(base, (list, tuple))
    bases: list[Any] = [*base] if several else [base]
    for one in bases:
        name = type(one).__name__
        if not isinstance(one, Optimizer):
            raise TypeError(
                "base must be a torch.optim.Optimizer that is built, or a list of them:"
                f" ARSAM(torch.optim.SGD(model.parameters(), lr=0.1), model); got {name}"
            )
        if isinstance(one, Wrapper):
            raise TypeError(f"base is a {name} already; give it the optimizer that it wraps")
        if isinstance(one, torch.optim.SparseAdam):
            raise TypeError("SparseAdam takes sparse gradients only, and an ascent needs dense ones: take Adam, sparse=False")
        if _needs_closure(one):
            raise TypeError(f"{name} runs its closure by itself, as often as it likes, so it cannot be a base")
    if not bases:
        raise TypeError("base is an empty list; give at least one torch.optim.Optimizer")
    return Several(bases) if len(bases) > 1 else bases[0]


def _needs_closure(base: Optimizer) -> bool:
    parameter = inspect.signature(type(base).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def check_numbers(passes: float | None, rho: float, rho_warmup: int, clip: float | None, eps: float) -> None:
    """Raise ValueError for a number out of its range."""
    if passes is not None and not 1 <= passes <= 2:
        raise ValueError(f"passes must lie in [1, 2], got {passes}")
    if not rho >= 0:
        raise ValueError(f"rho must be >= 0, got {rho}")
    if not rho_warmup >= 0 or rho_warmup != int(rho_warmup):
        raise ValueError(f"rho_warmup must be a number of steps >= 0, got {rho_warmup}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, or None for no clipping, got {clip}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")


def check_model(model: Any, per_rank: bool) -> None:
    """Raise TypeError for what is no module, ValueError for one that cannot keep the gradients of its ranks apart."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if per_rank and distributed.ranks() > 1 and not hasattr(model, "no_sync"):
        raise ValueError("per_rank=True needs model to be the DistributedDataParallel module")


def rules(passes: float | None, sampling: Sampling | None, reuse: Reuse | None) -> tuple[Sampling, Reuse]:
    """The sampling and the reuse rule, given or by default.

    Raises:
        ValueError: `passes` and `sampling` are both given.
    """
    if sampling is not None:
        if passes is not None:
            raise ValueError("passes and sampling exclude each other: passes=1.2 is sampling=Budget(1.2)")
        return sampling, Decayed() if reuse is None else reuse
    return Budget(1.2 if passes is None else passes), Decayed("auto", None) if reuse is None else reuse


def warn_of_half(parameters: list[Tensor]) -> None:
    """Warn where w + e would round back to w."""
    if any(p.dtype in functional.HALF for p in parameters):
        warnings.warn(
            "half-precision parameters: most of them round w + e back to w, so that the perturbation is lost; keep the"
            " parameters in float32 and use torch.autocast",
            stacklevel=4,  # the line that builds the optimizer
        )


def check_rules(sampling: Sampling, reuse: Reuse, per_rank: bool) -> None:
    """Raise ValueError if the rules do not go together, or not with a gradient per rank."""
    name = type(sampling).__name__
    if per_rank and getattr(sampling, "reads_gradient", False):
        raise ValueError(f"per_rank=True: ranks with their own gradients would decide apart by sampling.{name}")
    if getattr(reuse, "needs_spacing", False) and not hasattr(sampling, "spacing"):
        raise ValueError(f'beta="auto" needs a sampling rule with a spacing; {name} has none: give beta')


def claim_rule(optimizer: Any) -> None:
    """Raise ValueError if the optimizer's sampling rule has a history, and that of another optimizer."""
    rule = optimizer.sampling
    if not getattr(rule, "learns", False):
        return
    if id(rule) in _OWNERS:
        gc.collect()  # the other optimizer may be gone, and only wait to be collected
        owner = _OWNERS.get(id(rule))
        if owner is not None and owner.sampling is rule:
            raise ValueError(
                f"this {type(rule).__name__} already serves another optimizer, and learns from its steps; give each optimizer"
                " a sampling rule of its own"
            )
    _OWNERS[id(rule)] = optimizer
