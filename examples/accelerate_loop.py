"""ARSAM in a loop of Hugging Face's Accelerate: handwritten digits, a few seconds.

    pip install accelerate scikit-learn
    accelerate launch examples/accelerate_loop.py        # or plain python, on one process

Nothing of arsam is needed besides the optimizer, since this loop owns its backward. What to mind:

- `prepare` wraps the optimizer; ``prepared.optimizer`` is the ARSAM, with `due` and `perturb`.
- The second pass repeats every batch that the first one accumulated, and is decided when the last of them is in. To ask
  after each batch would perturb by a part of the gradient.
- A loop that clips gives `perturb` the scaler, which is None but under fp16: clipping unscales.
- Under fp16 a step that overflowed leaves the weights alone, but Accelerate takes it for done and moves the learning rate
  on, as with all optimizers that unscale by themselves.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from arsam import ARSAM


def network() -> nn.Module:
    """A small network with BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def loader() -> DataLoader[Any]:
    """The digits of scikit-learn."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    return DataLoader(data, batch_size=64, drop_last=True)


def optimizer_for(model: nn.Module) -> ARSAM:
    """An ARSAM is an optimizer."""
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ARSAM(base, model)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Any, clip: float | None = None) -> None:
    """One epoch."""
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    arsam = optimizer.optimizer

    def backward(inputs: Tensor, labels: Tensor) -> None:
        with accelerator.autocast():
            loss = nn.functional.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)  # divides by the accumulated batches, scales

    accumulated = []
    for batch in batches:
        accumulated.append(batch)
        with accelerator.accumulate(model):
            backward(*batch)
            if accelerator.sync_gradients:
                if arsam.due:
                    with arsam.perturb(accelerator.scaler if clip else None):
                        for some in accumulated:
                            with nullcontext() if some is batch else accelerator.no_sync(model):
                                backward(*some)
                accumulated = []
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()  # does nothing before the last of the accumulated batches, nor does zero_grad
            optimizer.zero_grad()


def main() -> None:
    """Train, and say what it took."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = network()
    optimizer = optimizer_for(model)
    train(accelerator, model, optimizer, loader(), clip=1.0)
    accelerator.print(optimizer.stats)


if __name__ == "__main__":
    main()
