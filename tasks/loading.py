"""Which items make up which batch of a run: a function of the seed and the step alone, whoever loads them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tasks import distributed
from tasks.config import Config
from tasks.task import Batch


def loader(data: Dataset[Any], config: Config, device: torch.device, **batching: Any) -> DataLoader[Batch]:
    """A loader of seeded items; what is in a batch is given by a sampler of (epoch, index) keys.

    Args:
        data: the split.
        config: seed and workers.
        device: the batches go to.
        batching: DataLoader's batch_sampler, or batch_size and sampler.
    """
    # A generator of its own: without one a loader draws from the global one, and a resumed run would be a draw ahead.
    generator = torch.Generator().manual_seed(config.seed)
    workers = min(config.num_workers, os.cpu_count() or 1)
    return DataLoader(
        Seeded(data, config.seed), num_workers=workers, pin_memory=device.type == "cuda", generator=generator, **batching
    )


class Batches(Sampler[list[tuple[int, int]]]):
    """(epoch, index) keys of every batch of a run from step `start` on, this process' share of them.

    Args:
        items: in the training split.
        size: of a batch; a smaller split makes one smaller batch, a remainder waits for another epoch's order.
        epochs: of the run.
        seed: of the order.
    """

    def __init__(self, items: int, size: int, epochs: int, seed: int) -> None:
        self.items = items
        self.size = min(size, items)
        self.per_epoch = items // self.size
        self.total = self.per_epoch * epochs
        self.start = 0
        self._seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.total):
            if not order or step % self.per_epoch == 0:
                order = self._order(step // self.per_epoch)
            yield distributed.share(self._keys(step, order))

    def keys(self, step: int) -> list[tuple[int, int]]:
        """The whole batch of one step, over all processes."""
        return self._keys(step, self._order(step // self.per_epoch))

    def _keys(self, step: int, order: list[int]) -> list[tuple[int, int]]:
        epoch, place = divmod(step, self.per_epoch)
        return [(epoch, index) for index in order[place * self.size : (place + 1) * self.size]]

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.items).tolist()

    def __len__(self) -> int:
        return self.total - self.start


class Seeded(Dataset[Any]):
    """A dataset whose random choices depend on (seed, epoch, index) alone, whatever process loads the item.

    So the number of workers changes nothing, and a resumed run sees the very items that it would have seen.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        word = int(np.random.SeedSequence([self._seed, epoch, index]).generate_state(1)[0])
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=()):
            random.seed(word)
            np.random.seed(word)
            torch.manual_seed(word)
            try:
                return self._data[index]
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])
