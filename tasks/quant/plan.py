"""What the stages will do, said before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.config import Config


def lines(config: Config, task: Any, source: Path | None) -> list[str]:
    """A line per stage that costs time, with the setting that changes it.

    Args:
        config: of the quantization-aware training.
        task: its task.
        source: the file of the float weights; None: timm's own, or trained.
    """
    train, val = len(task.dataset("train")), len(task.dataset("val"))
    how = task.calibration
    float_epochs = config.pretraining.epochs if config.pretraining is not None else 0
    if source is not None:
        first = f"float: weights of {source}"
    elif getattr(task, "pretrained", False):
        first = "float: timm's pretrained weights"
    else:
        first = (
            f"float: trained from scratch, {float_epochs} epochs of {train} items (pretraining.epochs={float_epochs};"
            " --checkpoint FLOAT.pt leaves it out)"
        )
    return [
        "plan:",
        f"  {first}",
        f"  calibration: {how.pictures} inputs of {how.source or 'the training split'}, method {how.method}"
        + (", rounding learned" if how.rounding == "learned" else ""),
        f"  training: {config.epochs} epochs of {train} items, {config.batch_size} at a time (epochs={config.epochs})"
        if config.epochs
        else "  training: none (epochs=0)",
        f"  each stage is measured on {val} items",
    ]
