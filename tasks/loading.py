"""Which items make up which batch of a run: a function of the seed and the step alone, whoever loads them.

A data set may answer one item, ``data[index]``, or a whole batch, ``data.batch(indices) -> Batch`` with indices [B] int64.
The second is asked in the training process, without workers and without a seed per item: it is for data that lie in memory.
What it draws comes from torch's own generator, whose state is in the checkpoint, so that such a run too is resumed bitwise.
"""

# numpy's stubs know nothing of its global bit generator
# pyright: reportAttributeAccessIssue=false

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
from tasks.errors import UserError
from tasks.task import Batch

Indices = np.ndarray[Any, np.dtype[np.int64]]
Part = tuple[int, Indices]  # what is asked for as one batch: the epoch, and the indices of the items, [B]


def load(data: Any, config: Config, device: torch.device, batches: Iterable[Part]) -> Iterable[Batch]:
    """The batches of these items, one after the other.

    Args:
        data: the split.
        config: seed and workers.
        device: the batches go to.
        batches: the items of each.
    """
    if hasattr(data, "batch"):
        return (data.batch(torch.from_numpy(indices)) for _, indices in batches)
    # A generator of its own: without one a loader draws from the global one, and a resumed run would be a draw ahead.
    generator = torch.Generator().manual_seed(config.seed)
    workers = min(config.num_workers, os.cpu_count() or 1)
    return _named(
        DataLoader(
            Seeded(data, config.seed),
            batch_sampler=_Keys(batches),  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=generator,
        )
    )


def _named(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; a loader process that is gone is an error that says what to do.

    Raises:
        UserError: one was killed, or had no room.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"num_workers: a loader process has ended, which is what the system does where memory is short ({what}); fewer"
            " workers or a smaller batch_size will do"
        ) from error


class _Keys:
    """The (epoch, index) keys that `Seeded` is asked for, as a batch sampler."""

    def __init__(self, batches: Iterable[Part]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, indices in self._batches:
            yield [(epoch, index) for index in indices.tolist()]


class Batches:
    """The items of every batch of a run, this process' share of them.

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

    def after(self, step: int) -> Iterator[Part]:
        """The batches of a run that has taken `step` steps."""
        order = self._order(step // self.per_epoch)
        for number in range(step, self.total):
            epoch, place = divmod(number, self.per_epoch)
            if place == 0:
                order = self._order(epoch)
            yield epoch, distributed.share(order[place * self.size : (place + 1) * self.size])

    def whole(self, step: int) -> Part:
        """The batch of one step, over all processes."""
        epoch, place = divmod(step, self.per_epoch)
        return epoch, self._order(epoch)[place * self.size : (place + 1) * self.size]

    def _order(self, epoch: int) -> Indices:
        return np.random.default_rng([self._seed, epoch]).permutation(self.items)


class Seeded(Dataset[Any]):
    """A dataset whose random choices depend on (seed, epoch, index) alone, whatever process loads the item.

    So the number of workers changes nothing, and a resumed run sees the very items that it would have seen. A data set with
    ``random = False`` draws nothing, and is spared the seed of each item.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self._data = data
        self._seed = seed
        self._generator = np.random.MT19937(0)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if not getattr(self._data, "random", True):
            return self._data[index]
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
