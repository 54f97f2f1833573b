"""What an optimizer asks of the other ranks: how many they are, one schedule for all, and the mean of a gradient."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arsam.sampling import Sampling


def ranks() -> int:
    """Processes that train together; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_schedule(sampling: Sampling) -> None:
    """Give every rank the state that the rule has on rank 0, its seed among it."""
    state = [sampling.state_dict()]
    dist.broadcast_object_list(state, src=0)
    sampling.load_state_dict(state[0])


def average_(tensors: list[Tensor], group: Any) -> None:
    """x_i <- mean of x_i over the ranks of a process group; None is the group of all."""
    if ranks() == 1:
        return
    works = [dist.all_reduce(x, group=group, async_op=True) for x in tensors]
    for work in works:
        work.wait()
    torch._foreach_div_(tensors, dist.get_world_size(group))
