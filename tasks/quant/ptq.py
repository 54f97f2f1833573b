"""Quantization without training: calibration, and what makes it good at few bits, each a switch of `lowbit.Calibration`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tasks.errors import UserError
from tasks.quant.calibrate import calibrate
from tasks.quant.correct import correct_statistics, distance
from tasks.quant.prepare import convert
from tasks.quant.rounding import learn_rounding

HELD_OUT = 256  # inputs that the corrections are judged by, at most


def prepared(task: Any, model: nn.Module, device: torch.device) -> nn.Module:
    """Calibrate a fake-quantized model, in place, as its task says; the float model that it was made of.

    Args:
        task: a `LowBit`.
        model: fake-quantized, step sizes not yet set.
        device: of both.

    Raises:
        UserError: rounding cannot be learned for this network.
    """
    how = task.calibration
    reference = convert(model)
    calibrate(model, _some(task, device, *_parts(task)[0]), method=how.method, percentile=how.percentile)
    if how.rounding == "learned":
        try:
            learn_rounding(model, reference, _some(task, device, *_parts(task)[0]))
        except ValueError as error:
            raise UserError(f"task.calibration.rounding=learned: {error}; take nearest") from error
    return reference


def corrected(
    task: Any, model: nn.Module, reference: nn.Module, device: torch.device
) -> tuple[nn.Module | None, dict[str, float]]:
    """A copy with statistics and biases corrected, None if that is off, and how far each is from float on held-out inputs."""
    fit, held_out = _parts(task)

    reference.eval()
    with torch.no_grad():
        targets = [reference(x).float() for x in _some(task, device, *held_out)]

    def wanted() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(_some(task, device, *held_out), targets, strict=True)

    gains = {"calibrated": distance(model, wanted())}
    if not task.calibration.correct:
        return None, gains
    better = copy.deepcopy(model)
    correct_statistics(better, reference, _some(task, device, *fit))
    return better, {**gains, "corrected": distance(better, wanted())}


def _parts(task: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(start, count) of the inputs that are looked at, and of those held out: the next ones, or a fifth where few are left."""
    found, count = task.inputs_count(), task.calibration.pictures
    if found - count >= min(HELD_OUT, count) // 4:
        return (0, count), (count, min(HELD_OUT, found - count))
    found = min(found, count)
    held_out = max(1, found // 5)
    return (0, max(1, found - held_out)), (found - held_out, held_out)


def _some(task: Any, device: torch.device, start: int, count: int) -> Iterator[Tensor]:
    return (x.to(device) for x in task.inputs(count, augment=False, start=start))
