"""What the training loop asks of a task: a model, data, the loss of a batch, and an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = dict[str, Tensor]


class Task(Protocol):
    """A frozen dataclass of settings; what is alive is built by its methods."""

    @property
    def name(self) -> str:
        """Name in result.json."""
        ...

    @property
    def metric(self) -> str:
        """The figure, larger is better, that picks best.pt."""
        ...

    def dataset(self, split: str) -> Dataset[Any]:
        """The split "train" or "val"; an item is a dict of tensors. Random choices draw from the global generators."""
        ...

    def build(self) -> nn.Module:
        """A fresh model, initialised from torch's generator or from a weights file that the settings name."""
        ...

    def parameters(self, model: nn.Module) -> Sequence[Any]:
        """What the optimizer is given: parameters, or groups of them."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, 0-dim."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """The metrics of a model over the whole "val" split, in evaluation mode and without gradients.

        Args:
            model: evaluated.
            batches: the split's items.
            out: where pictures may be written.
        """
        ...
