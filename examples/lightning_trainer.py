"""ARSAM in Lightning: handwritten digits, a few seconds, in any precision.

    pip install lightning scikit-learn
    python examples/lightning_trainer.py [32-true | bf16-mixed | 16-mixed]

See arsam/integrations/lightning.py for what `SharpnessAware` takes care of.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from arsam import ARSAM
from arsam.integrations.lightning import SharpnessAware


class Digits(SharpnessAware):
    """A small network with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> ARSAM:
        """An ARSAM is an optimizer."""
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return ARSAM(base, self.net)


def loader() -> DataLoader[Any]:
    """The digits of scikit-learn."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    return DataLoader(data, batch_size=64, drop_last=True)


def main(precision: str = "32-true") -> None:
    """Train, and say what it took."""
    torch.manual_seed(0)
    trainer = Trainer(max_epochs=3, precision=precision, logger=False, enable_checkpointing=False)  # type: ignore[arg-type]
    trainer.fit(Digits(), loader())
    print(trainer.optimizers[0].stats, trainer.callback_metrics)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
