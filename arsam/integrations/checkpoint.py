"""torch.distributed.checkpoint: save and load an ARSAM by parameter name, whatever way the model is sharded."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from arsam import functional
from arsam.optimizer import ARSAM


class OptimizerState(Stateful):
    """What `torch.distributed.checkpoint.save` and `load` take for an ARSAM, on one rank or many.

    The checkpoint may be loaded by another number of ranks, and by a model that is not sharded at all.

    Example:
        >>> state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
        >>> torch.distributed.checkpoint.save(state, checkpoint_id=folder)
        >>> torch.distributed.checkpoint.load(state, checkpoint_id=folder)

    Args:
        model: whose parameters the optimizer has; plain, DistributedDataParallel or `fully_shard`.
        optimizer: to save from, or to load into.
    """

    def __init__(self, model: nn.Module, optimizer: ARSAM) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The base's state and the kept vectors by parameter name; zeros stand for a vector that is not there.

        A load fills tensors that exist, so every entry must exist before it: torch does the same for the base's state.
        """
        own = self.optimizer.state_dict()["arsam"]
        kept: dict[int, Tensor] = own.pop("kept")
        names = self._names()
        tensors = {name: kept[i] if i in kept else _zeros(p) for i, (name, p) in enumerate(names)}
        own["kept"] = [names[i][0] for i in kept]
        return {"base": get_optimizer_state_dict(self.model, self.optimizer.base), "kept": tensors, "own": json.dumps(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on bitwise from a `state_dict`, its tensors filled by a load.

        Raises:
            ValueError: it was made with other sampling or reuse rules.
        """
        own = json.loads(state_dict["own"])
        places = {name: i for i, (name, _) in enumerate(self._names())}
        own["kept"] = {places[name]: state_dict["kept"][name] for name in own["kept"]}
        self.optimizer._check_rules(own["rules"])
        set_optimizer_state_dict(self.model, self.optimizer.base, state_dict["base"])
        self.optimizer._load_own(own)

    def _names(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) in the optimizer's order; names without the prefixes of DDP and torch.compile."""
        names = {p: n.removeprefix("module.").replace("_orig_mod.", "") for n, p in self.model.named_parameters()}
        return [(names[p], p) for group in self.optimizer.param_groups for p in group["params"]]


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.float32 if p.dtype in functional.HALF else p.dtype, requires_grad=False)
