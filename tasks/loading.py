"""Which items make up which batch of a run: a function of the seed and the step alone, whoever loads them.

A data set may answer one item, ``data[index]``, or a whole batch, ``data.batch(indices) -> Batch`` with indices [B] int64.
The second is asked in the training process, without workers and without a seed per item: it is for data that lie in memory.
What it draws comes from torch's own generator, whose state is in the checkpoint, so that such a run too is resumed bitwise.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tasks import distributed
from tasks.config import Config
from tasks.task import Batch

Keys = list[tuple[int, int]]  # (epoch, index) of each item of a batch


def load(data: Any, config: Config, device: torch.device, batches: Iterable[Keys]) -> Iterable[Batch]:
    """The batches with these keys, one after the other.

    Args:
        data: the split.
        config: seed and workers.
        device: the batches go to.
        batches: keys of each.
    """
    if hasattr(data, "batch"):
        return (data.batch(torch.tensor([index for _, index in keys])) for keys in batches)
    # A generator of its own: without one a loader draws from the global one, and a resumed run would be a draw ahead.
    generator = torch.Generator().manual_seed(config.seed)
    workers = min(config.num_workers, os.cpu_count() or 1)
    return DataLoader(
        Seeded(data, config.seed),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=generator,
    )


class Batches:
    """(epoch, index) keys of every batch of a run, this process' share of them.

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
        self._seed = seed

    def after(self, step: int) -> Iterator[Keys]:
        """The batches of a run that has taken `step` steps."""
        order: list[int] = []
        for number in range(step, self.total):
            if not order or number % self.per_epoch == 0:
                order = self._order(number // self.per_epoch)
            yield distributed.share(self._keys(number, order))

    def keys(self, step: int) -> Keys:
        """The whole batch of one step, over all processes."""
        return self._keys(step, self._order(step // self.per_epoch))

    def _keys(self, step: int, order: list[int]) -> Keys:
        epoch, place = divmod(step, self.per_epoch)
        return [(epoch, index) for index in order[place * self.size : (place + 1) * self.size]]

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.items).tolist()


class Seeded(Dataset[Any]):
    """A dataset whose random choices depend on (seed, epoch, index) alone, whatever process loads the item.

    So the number of workers changes nothing, and a resumed run sees the very items that it would have seen.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self._data = data
        self._seed = seed
        self._generator = np.random.MT19937(0)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        word = int(np.random.SeedSequence([self._seed, epoch, index]).generate_state(1)[0])
        # numpy's global generator is exchanged for one of our own, since a copy of its state costs more than a small picture.
        before = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
        np.random.set_bit_generator(self._generator)
        random.seed(word)
        np.random.seed(word)
        torch.default_generator.manual_seed(word)
        try:
            return self._data[index]
        finally:
            random.setstate(before[0])
            np.random.set_bit_generator(before[1])
            torch.set_rng_state(before[2])
