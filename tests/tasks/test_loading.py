"""Which items make up which batch, and what they draw."""

from __future__ import annotations

import random

import numpy as np
import torch

from tasks import loading
from tests.tasks import toy


def test_batches() -> None:
    """Each item once per epoch, in an order of its own, a remainder left over; a start in the midst goes on the same."""
    batches = loading.Batches(21, 4, 3, seed=5)
    whole = [(epoch, indices.tolist()) for epoch, indices in batches.after(0)]
    assert len(whole) == 15
    for epoch in range(3):
        assert {e for e, _ in whole[5 * epoch : 5 * epoch + 5]} == {epoch}
        assert len({i for _, indices in whole[5 * epoch : 5 * epoch + 5] for i in indices}) == 20
    assert whole[0][1] != whole[5][1]
    assert [(epoch, indices.tolist()) for epoch, indices in batches.after(7)] == whole[7:]
    assert batches.whole(7)[1].tolist() == whole[7][1]
    assert [len(indices) for _, indices in loading.Batches(3, 8, 2, seed=0).after(0)] == [3, 3]


class Drawing:
    """Items that draw from all three generators."""

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.randn()), float(torch.rand(()))


def test_items_depend_on_seed_epoch_and_index_alone() -> None:
    """As their words say: the numbers are those of generators seeded by hand. Kills: a generator that is not seeded."""
    data = loading.Seeded(Drawing(), 3)
    word = int(np.random.SeedSequence([3, 1, 2]).generate_state(1)[0])
    first = data[1, 2]
    assert first == (
        random.Random(word).random(),
        np.random.RandomState(word).randn(),
        float(torch.rand((), generator=torch.Generator().manual_seed(word))),
    )
    _ = random.random(), np.random.randn(), torch.rand(1)
    assert data[1, 2] == first
    assert len({data[1, 2], data[1, 3], data[2, 2], loading.Seeded(Drawing(), 4)[1, 2]}) == 4


def test_items_leave_the_generators_alone() -> None:
    """Loading an item in this process must not disturb the run's own random numbers, even where the item fails."""
    data = loading.Seeded(Drawing(), 0)
    found = []
    for loads in (False, True):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        if loads:
            _ = data[0, 1]
        found.append((float(torch.rand(())), np.random.rand(), random.random()))
    assert found[0] == found[1]


class InMemory:
    """Numbers that are answered by the batch."""

    def __len__(self) -> int:
        return 10

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """The numbers, and noise."""
        return {"x": indices.float(), "noise": torch.rand(len(indices))}


def test_data_in_memory_are_asked_for_whole_batches() -> None:
    """In the run's own order. Kills: a loader around them, an order of their own."""
    batches = loading.Batches(10, 4, 2, seed=1)
    torch.manual_seed(0)
    found = list(loading.load(InMemory(), toy.config, toy.CPU, batches.after(1)))
    assert [batch["x"].tolist() for batch in found] == [indices.tolist() for _, indices in batches.after(1)]
    torch.manual_seed(0)
    assert torch.equal(found[0]["noise"], torch.rand(4)), "from the generator that the checkpoint holds"
