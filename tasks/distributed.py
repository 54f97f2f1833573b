"""Several processes of one run, as torchrun starts them. In a process of its own everything here does nothing."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tasks.errors import UserError

T = TypeVar("T")
S = TypeVar("S", bound=Any)  # what can be sliced


def start() -> None:
    """Join the others, if torchrun started this process as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()


def stop() -> None:
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0. Process 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share(items: S) -> S:
    """This process' part of what is dealt out in turn."""
    return items[rank() :: world()]


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, on all of them."""
    if world() == 1:
        return items
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def first(value: T) -> T:
    """Process 0's value, on all of them."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def anywhere(*flags: bool) -> tuple[bool, ...]:
    """Which of the flags are set in any process?"""
    if world() == 1:
        return flags
    counts = torch.tensor(flags, dtype=torch.int32)  # on the CPU: no accelerator is made to wait
    dist.all_reduce(counts)
    return tuple(bool(count) for count in counts)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is trained: its gradients averaged over the processes."""
    if world() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def same_buffers(model: nn.Module) -> None:
    """Process 0's running statistics, in all of them: each has seen its own share of the batches."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def check(batch_size: int) -> None:
    """A batch must be dealt out evenly: the mean of the processes' means is then the batch's.

    Raises:
        UserError: it is not.
    """
    if batch_size % world():
        raise UserError(f"batch_size: the {batch_size} items of a step cannot be dealt out evenly to {world()} processes")
