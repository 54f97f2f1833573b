"""ARSAM in a loop built of timm's parts: handwritten digits, a few seconds.

    pip install timm scikit-learn
    python examples/timm_loop.py

The model, the base optimizer, the schedule, the clipping and the average of weights are timm's. Its NativeScaler is not: it
runs backward and step in one call, so that there is no place for a second pass in between, and the first ascent is an error.
`arsam.scaled_step` and torch's own GradScaler take its place; where there is nothing to scale, in float32 and bfloat16,
``optimizer.step(closure)`` is the same.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from arsam import ARSAM, scaled_step


def network() -> nn.Module:
    """One of timm's smallest networks with BatchNorm."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, in_chans=1)


def batches() -> list[tuple[Tensor, Tensor]]:
    """The digits of scikit-learn at 32x32, a few of them."""
    digits = load_digits()
    pictures = torch.tensor(digits.images[:640], dtype=torch.float32)[:, None] / 16
    pictures = nn.functional.interpolate(pictures, scale_factor=4.0)
    return list(zip(pictures.split(64), torch.tensor(digits.target[:640]).split(64), strict=True))


def optimizer_for(model: nn.Module, clip: float | None = None) -> ARSAM:
    """timm's optimizer inside; clipping where the update reads the gradient, with the PSF mixed in and unscaled."""
    base = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)

    def clip_gradients(*_: object) -> None:
        if clip is not None:
            dispatch_clip_grad(model.parameters(), clip)

    base.register_step_pre_hook(clip_gradients)
    return ARSAM(base, model)


def train(model: nn.Module, optimizer: ARSAM, scaler: GradScaler, dtype: torch.dtype, epochs: int = 2) -> ModelEmaV3:
    """Some epochs; returns the average of the weights."""
    model.train()
    average = ModelEmaV3(model, decay=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs * len(batches()), warmup_t=3, t_in_epochs=False)
    criterion = nn.CrossEntropyLoss()
    for step, (inputs, labels) in enumerate(epochs * batches()):

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = criterion(model(inputs), labels)
            scaler.scale(loss).backward()
            return loss

        scaled_step(optimizer, closure, scaler)
        average.update(model, step)
        schedule.step_update(step + 1)
    return average


def main() -> None:
    """Train, and say what it took."""
    model = network()
    optimizer = optimizer_for(model, clip=1.0)
    train(model, optimizer, GradScaler("cpu"), torch.bfloat16)
    print(optimizer.stats)


if __name__ == "__main__":
    main()
