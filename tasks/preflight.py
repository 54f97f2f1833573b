"""What a run will need, looked at before its first step: hours later is too late to learn that something is missing."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from tasks.config import Config
from tasks.errors import UserError
from tasks.loading import Seeded
from tasks.step import autocast
from tasks.task import Batch

_SHARED = "/dev/shm"  # through which loader processes hand over what they have loaded


def check(config: Config, data: Any, model: nn.Module, device: torch.device) -> None:
    """Look at both splits, and run a training batch of two through the network.

    Args:
        config: of the run.
        data: the training split.
        model: the network, which is left as it is, as the generators are.
        device: of the network.

    Raises:
        UserError: the val split is missing or empty, an item cannot be read, a batch does not fit the network, or the loader
            processes have no room.
    """
    items: list[Any] = []
    if not hasattr(data, "batch"):  # which lies in memory
        seeded = Seeded(data, config.seed)
        items = [seeded[0, index] for index in range(min(2, len(data)))]
    val, _ = split(config, "val")
    if not hasattr(val, "batch"):
        Seeded(val, config.seed)[0, 0]
    if items and isinstance(items[0], dict) and all(isinstance(value, torch.Tensor) for value in items[0].values()):
        _check_room(config, sum(value.nbytes for value in items[0].values()), len(data))
    if items and hasattr(config.task, "example"):  # the network takes pictures
        _check_fit(config, torch.utils.data.default_collate(items), copy.deepcopy(model).eval(), device)


def split(config: Config, name: str) -> tuple[Any, int]:
    """The data of a split, and how many items they are.

    Raises:
        UserError: there are none, or they cannot be had with these settings.
    """
    try:
        data: Any = config.task.dataset(name)
        items = len(data)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # a data set of anybody's, with settings of anybody's
        what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise UserError(f"task: the split {name} cannot be had with these settings: {what}") from error
    if not items:
        raise UserError(f"the {name} split holds nothing to {'learn from' if name == 'train' else 'evaluate'}")
    return data, items


def _check_fit(config: Config, batch: Batch, model: nn.Module, device: torch.device) -> None:
    batch = {name: value.to(device) for name, value in batch.items()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), autocast(config, device):
            config.task.loss(model, batch)
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network says to an input that it is not made for
        shapes = ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in batch.items() if value.dim() > 1)
        what = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise UserError(f"task: the network and its data do not fit each other ({shapes}): {what}") from error


def _check_room(config: Config, item: int, items: int) -> None:
    """Each worker loads two batches ahead, which lie in shared memory."""
    if not config.num_workers or not os.path.isdir(_SHARED):
        return
    workers = min(config.num_workers, os.cpu_count() or 1)
    needed = 2 * workers * min(config.batch_size, items) * item
    system = os.statvfs(_SHARED)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise UserError(
            f"num_workers={config.num_workers}: the loader processes need up to {needed / 2**20:.0f} MB of shared memory, and"
            f" {_SHARED} has {free / 2**20:.0f} MB; fewer workers or a smaller batch_size will do, or docker run --shm-size"
        )
