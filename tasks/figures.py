"""The numbers of a run, as its records and its terminal have them."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch.optim import Optimizer

from arsam import ARSAM
from tasks.loading import Batches
from tasks.state import Progress


def epoch_line(progress: Progress, batches: Batches, loss_sum: float) -> dict[str, Any]:
    """The present epoch so far, as metrics.jsonl has it.

    Args:
        progress: of the run, after one of the epoch's steps.
        batches: of the run.
        loss_sum: over the steps that were not left out.
    """
    steps = (progress.step - 1) % batches.per_epoch + 1
    taken = steps - progress.epoch_skipped
    return {
        "epoch": (progress.step - 1) // batches.per_epoch + 1,
        "step": progress.step,
        "loss": loss_sum / taken if taken else None,
        "passes_per_step": progress.epoch_passes / steps,
        "images_per_second": steps * batches.size / progress.epoch_seconds,
        "seconds_waiting": progress.epoch_seconds_waiting,  # for data
        "skipped": progress.epoch_skipped,
    }


def signs(optimizer: Optimizer) -> dict[str, Any]:
    """What the last ascent says of rho, as far as it is known: "rise", "psf_ratio" and "cosine" (docs/rho.md)."""
    stats = optimizer.stats if isinstance(optimizer, ARSAM) else {}
    return {name: stats[name] for name in ("rise", "psf_ratio", "cosine") if stats.get(name) is not None}


def totals(progress: Progress, batches: Batches, device: torch.device) -> dict[str, Any]:
    """The whole run, as result.json has it."""
    return {
        "steps": progress.step,
        "ascents": progress.passes - progress.step,
        "passes_per_step": progress.passes / progress.step,
        "train_seconds": progress.seconds,
        "images_per_second": progress.step * batches.size / progress.seconds,
        "peak_memory_mb": _peak_memory(device),
    }


def show(line: dict[str, Any]) -> str:
    """An epoch's line for people."""
    text = f"{_show_loss(line['loss'], 5)}  passes/step {line['passes_per_step']:.2f}  {line['images_per_second']:.0f} images/s"
    return text + (f"  {line['skipped']} steps skipped (NaN or inf)" if line["skipped"] else "")


def bar_parts(line: dict[str, Any], ascents: int) -> list[tuple[str, str]]:
    """An epoch's line for a bar, each part long and short, the most important first."""
    loss, speed = _show_loss(line["loss"], 3), f"{line['images_per_second']:.0f}"
    passes, count = f"{line['passes_per_step']:.2f} passes/step", f"{ascents} ascents"
    parts = [(loss, loss), (passes, passes), (f"{speed} images/s", f"{speed} img/s"), (count, count)]
    if line["skipped"]:
        parts.insert(1, (f"{line['skipped']} steps skipped (NaN or inf)", f"{line['skipped']} NaN"))
    return parts


def divergence(progress: Progress, batches: Batches) -> str:
    """What went wrong on too many steps in a row, where, and what to try."""
    epoch, indices = batches.whole(progress.step - 1)
    items = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return (
        f"NaN or inf in the loss or a gradient on {progress.skipped_in_a_row} steps in a row, lastly step"
        f" {progress.step - 1} (epoch {epoch + 1}, training items {items}); last.pt holds the weights before them;"
        " lower optimizer.lr or sharpness.rho, set clip_norm, or look at these items"
    )


def _show_loss(loss: float | None, digits: int) -> str:
    return "loss none" if loss is None else f"loss {loss:.{digits}g}"


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def more_epochs(before: int, epochs: int) -> str:
    """What it means for a run that its number of epochs has changed."""
    return (
        f"epochs was {before}, is {epochs}: from here on the learning rate and the rules are those of a run of {epochs}"
        " epochs, which the steps so far were not"
    )
