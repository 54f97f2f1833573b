"""The state of an ARSAM: a `state_dict` in torch's form, and what torch.distributed.checkpoint takes of one.

torch's own functions for distributed checkpoints ask an optimizer for its state_dict, keep "state" and "param_groups" by
parameter name, and drop all else. For them the kept vectors stand among the entries of their parameters, and all the rest in
the first parameter group, as JSON.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import sys
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor

from arsam import functional

VERSION = 2  # 1 had no version, "rho" and "adaptive" as group keys, and the rules without their settings
_KEPT, _REST = "arsam_kept", "arsam"
_CHECKPOINT = "torch.distributed.checkpoint.state_dict"


def settings_of(rule: Any) -> dict[str, Any]:
    """A rule's public attributes that are plain values, without what its own state holds (a seed)."""
    held: dict[str, Any] = rule.state_dict() if hasattr(rule, "state_dict") else {}
    attributes = cast("dict[str, Any]", vars(rule))
    plain = {name: value for name, value in attributes.items() if not name.startswith("_") and name not in held}
    for name, value in plain.items():
        if isinstance(value, tuple):
            plain[name] = list(cast("tuple[Any, ...]", value))
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, list, type(None)))}


def shown(rule: Any) -> str:
    """A rule as it would be built: Budget(passes_per_step=1.2, total_steps=None, warmup=0)."""
    return f"{type(rule).__name__}({', '.join(f'{name}={value!r}' for name, value in settings_of(rule).items())})"


def check_rules(saved: list[str], rules: list[str]) -> None:
    """Raise ValueError if a state was made with other rules than these, or other settings of them."""
    named = all("(" in rule for rule in saved)  # the first version gave the names alone
    if saved != (rules if named else [rule.partition("(")[0] for rule in rules]):
        raise ValueError(
            f"the state was made with {' and '.join(saved)}, this optimizer has {' and '.join(rules)}: build it with the same"
            " rules, or start without this state"
        )


def state_of(optimizer: Any) -> dict[str, Any]:
    """All that an ARSAM has beside its base's state: containers, numbers and tensors."""
    index = {p: i for i, p in enumerate(optimizer._parameters())}
    return {
        "version": VERSION,
        "steps": optimizer._steps,
        "ascents": optimizer._ascents,
        "reuses": optimizer._reuses,
        "age": optimizer._age,
        "kept": {index[p]: x for p, x in optimizer._kept.items()},
        "size": float(optimizer._size) if optimizer._kept and optimizer._size is not None else None,
        "length": None if optimizer._length is None else float(optimizer._length),
        "last": optimizer._last.read(),
        "rho_warmup": optimizer.rho_warmup,
        "rules": [shown(optimizer.sampling), shown(optimizer.reuse)],
        "sampling": optimizer.sampling.state_dict(),
    }


def load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Go on from a `state_dict`, in torch's form or in that of a distributed checkpoint.

    Raises:
        ValueError: it is a plain optimizer's, or was made with other rules.
    """
    state = from_parameters(state_dict) if is_by_parameter(state_dict) else dict(state_dict)
    if _REST not in state:
        raise ValueError(
            'the state has no entry "arsam", so it is a plain optimizer\'s; to start ARSAM from it, load it into optimizer.base'
        )
    own = state.pop(_REST)
    optimizer._check_rules(own["rules"])
    optimizer.base.load_state_dict(state)
    load_into(optimizer, own)


def load_into(optimizer: Any, own: dict[str, Any]) -> None:
    """Go on from a `state_of`; the base has its state already."""
    parameters = optimizer._parameters()
    for group in optimizer.param_groups:
        optimizer._complete(group)
    optimizer._steps, optimizer._ascents, optimizer._reuses = own["steps"], own["ascents"], own["reuses"]
    optimizer._age, optimizer._pending = own["age"], None
    optimizer.rho_warmup = own.get("rho_warmup", optimizer.rho_warmup)
    kept: dict[int, Tensor] = own["kept"]
    optimizer._kept = {parameters[i]: x.detach().clone().to(parameters[i].device) for i, x in kept.items()}
    optimizer._size = None
    if kept:
        size = functional.global_norm(list(optimizer._kept.values()))
        optimizer._size = size if own.get("size") is None else torch.full_like(size, own["size"])
    length = own.get("length")
    # in the dtype that a norm has, so that a run goes on bitwise
    optimizer._length = None if length is None else functional.global_norm([parameters[0].new_zeros(1)]).fill_(length)
    optimizer._last.load(own.get("last", optimizer._last.read()))
    optimizer.sampling.load_state_dict(deepcopy(own["sampling"]))
    optimizer._agreed = False
    optimizer._agree()


def asking_checkpoint() -> dict[str, Any] | None:
    """The variables of the function of torch.distributed.checkpoint that asks, itself or through a wrapper; None: none does."""
    # They make their result of "state" and "param_groups" alone, and offer no hook: only their frame tells that they ask.
    frame: Any = sys._getframe(2) if _CHECKPOINT in sys.modules else None
    for _ in range(8):
        if frame is None:
            return None
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            return frame.f_locals
        frame = frame.f_back
    return None


def by_parameter(state: dict[str, Any], parameters: list[Tensor], asking: dict[str, Any]) -> dict[str, Any]:
    """The form that torch.distributed.checkpoint keeps whole.

    A load fills tensors that exist, so every parameter has an entry: zeros where there is no kept vector. The result of the
    function that asks gets the rest at its top as well, where a reader would look for it; a load does not need it there.
    """
    own = dict(state[_REST])
    kept: dict[int, Tensor] = own.pop("kept")
    own["keeps"] = bool(kept)
    trained = [i for i, p in enumerate(parameters) if p.requires_grad]
    entries = {i: {**state["state"].get(i, {}), _KEPT: kept[i] if i in kept else _zeros(parameters[i])} for i in trained}
    groups = [dict(group) for group in state["param_groups"]]
    groups[0][_REST] = json.dumps(own)
    if "optim_state_dict" in asking:
        asking["optim_state_dict"][_REST] = groups[0][_REST]
    return {**state, "state": {**state["state"], **entries}, "param_groups": groups}


def from_parameters(state: dict[str, Any]) -> dict[str, Any]:
    """A `state_dict` again, out of what `by_parameter` made; parameters by number or by name."""
    groups = [dict(group) for group in state["param_groups"]]
    own = json.loads(next(group[_REST] for group in groups if _REST in group))
    for group in groups:
        group.pop(_REST, None)
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    entries = {name: dict(entry) for name, entry in state["state"].items()}  # copies: the caller's stay whole
    kept = {numbers[name]: entry.pop(_KEPT) for name, entry in entries.items() if _KEPT in entry}
    own["kept"] = kept if own.pop("keeps") else {}
    return {"state": {name: entry for name, entry in entries.items() if entry}, "param_groups": groups, _REST: own}


def unflattening(frame: Any) -> bool:
    """Is it torch.distributed.checkpoint that looks, for the names of what a flat state holds?"""
    return frame.f_code.co_name == "_unflatten_optim_state_dict" and frame.f_globals.get("__name__") == _CHECKPOINT


def names_of_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the names of all that `by_parameter` put there."""
    return [{**group, _REST: None} if i == 0 else group for i, group in enumerate(groups)]


def names_of_state(state: Any, parameters: list[Tensor]) -> dict[Tensor, dict[str, Any]]:
    """The state with the names of all that `by_parameter` put there."""
    return {p: {**state.get(p, {}), _KEPT: None} for p in parameters}


def is_by_parameter(state: dict[str, Any]) -> bool:
    """Has `by_parameter` made it?"""
    return any(_REST in group for group in state.get("param_groups", ()))


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.float32 if p.dtype in functional.HALF else p.dtype, requires_grad=False)
