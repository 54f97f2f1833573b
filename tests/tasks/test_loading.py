"""Which items make up which batch, and what they draw."""

from __future__ import annotations

import torch

from tasks import loading
from tests.tasks import toy


def test_batches() -> None:
    """Each item once per epoch, in an order of its own, a remainder left over; a start in the midst goes on the same."""
    batches = loading.Batches(21, 4, 3, seed=5)
    whole = list(batches.after(0))
    assert len(whole) == 15
    for epoch in range(3):
        keys = [key for batch in whole[5 * epoch : 5 * epoch + 5] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys}) == 20
    assert [i for _, i in whole[0]] != [i for _, i in whole[5]]
    assert list(batches.after(7)) == whole[7:]
    assert whole[7] == batches.keys(7)
    assert [len(b) for b in loading.Batches(3, 8, 2, seed=0).after(0)] == [3, 3]


def test_items_leave_the_generators_alone() -> None:
    """Loading an item in this process must not disturb the run's own random numbers."""
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    _ = loading.Seeded(toy.Points(5), 0)[0, 1]
    assert torch.equal(torch.rand(1), expected)
