"""ARSAM in Hugging Face's Trainer: handwritten digits, a few seconds.

    pip install transformers accelerate scikit-learn
    python examples/transformers_trainer.py

See arsam/integrations/transformers.py for what `SharpnessAwareTrainer` takes care of.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainingArguments

from arsam import ARSAM
from arsam.integrations.transformers import SharpnessAwareTrainer


class Digits(nn.Module):
    """A small network with BatchNorm; a Trainer wants the loss from the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and the logits."""
        logits = self.net(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data() -> list[dict[str, Any]]:
    """The digits of scikit-learn."""
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    return [{"inputs": x, "labels": int(label)} for x, label in zip(inputs, digits.target, strict=True)]


def optimizer_for(model: nn.Module) -> ARSAM:
    """An ARSAM is an optimizer."""
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ARSAM(base, model)


def main() -> None:
    """Train, and say what it took."""
    torch.manual_seed(0)
    model = Digits()
    optimizer = optimizer_for(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=3, per_device_train_batch_size=64, report_to="none")
        SharpnessAwareTrainer(model, arguments, train_dataset=data(), optimizers=(optimizer, None)).train()
    print(optimizer.stats)


if __name__ == "__main__":
    main()
