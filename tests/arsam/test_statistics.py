"""frozen_statistics: nothing moves inside, everything is as before outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from arsam import frozen_statistics


class Observer(nn.Module):
    """The switches of torch's fake-quant modules."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("seen", torch.zeros(()))

    def disable_observer(self) -> None:
        self.observer_enabled[0] = 0  # type: ignore[index, operator]

    def enable_observer(self) -> None:
        self.observer_enabled[0] = 1  # type: ignore[index, operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer_enabled[0]:  # type: ignore[index]
            self.seen += 1
        return x


def timm_norm() -> nn.Module:
    from timm.layers import BatchNormAct2d  # type: ignore[attr-defined]

    return BatchNormAct2d(3)


MODULES = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "cumulative BatchNorm2d": lambda: nn.BatchNorm2d(3, momentum=None),
    "timm BatchNormAct2d": timm_norm,
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "observer": Observer,
}


@pytest.mark.parametrize("kind", MODULES)
def test_buffers_stand_still_and_outputs_stay(kind: str) -> None:
    """Kills: momentum 0 alone (num_batches_tracked counts on), evaluation mode (outputs change)."""
    model = nn.Sequential(MODULES[kind]())
    model(torch.randn(4, 3, 5, 5))
    other = copy.deepcopy(model)
    inputs = 3 + 2 * torch.randn(4, 3, 5, 5)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with frozen_statistics(model), frozen_statistics(model):
        inside = model(inputs)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    torch.testing.assert_close(inside, other(inputs))
    model(inputs)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), f"{name} no longer moves as before"


def test_nested_leaves_stay_frozen() -> None:
    """The inner exit must not thaw what the outer one froze."""
    model = nn.BatchNorm1d(2)
    with frozen_statistics(model):
        with frozen_statistics(model):
            pass
        model(torch.randn(4, 2))
        assert int(model.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert model.track_running_stats


def test_undone_after_an_exception() -> None:
    """Kills: a missing finally."""
    model = nn.BatchNorm1d(2)
    with pytest.raises(KeyError), frozen_statistics(model):
        raise KeyError
    assert model.track_running_stats


def test_evaluation_mode_is_left_alone() -> None:
    """Without running statistics, evaluation would normalise by the batch."""
    model = nn.BatchNorm1d(2).eval()
    inputs = torch.randn(4, 2)
    with frozen_statistics(model):
        torch.testing.assert_close(model(inputs), inputs / (1 + model.eps) ** 0.5)


def test_none() -> None:
    """No model, nothing to do."""
    with frozen_statistics(None):
        pass
