"""What the stages will do and how long that takes, said before they begin."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from arsam import ARSAM
from tasks.config import Config
from tasks.loading import Seeded
from tasks.quant.ptq import HELD_OUT
from tasks.task import Batch

_ITEMS = 8  # that a measured step has at most
_PASSES = 6  # over the calibration's inputs: steps and corrections look at them, and the float network beside them
_FILE = 60.0  # seconds, about: two exports, and the costs of two files


@dataclass(frozen=True)
class Pace:
    """Seconds per item on this machine.

    Args:
        load: of reading it, in one process.
        answer: of the float network in evaluation.
        answer_low: of the fake-quantized one.
        learn: of a forward-backward pass of the float network.
        learn_low: of the fake-quantized one.
    """

    load: float
    answer: float
    answer_low: float
    learn: float
    learn_low: float


def pace(config: Config, task: Any, device: torch.device) -> Pace:
    """Measure a few steps of both networks, with whatever weights; random numbers are then as they were.

    Args:
        config: of the quantization-aware training; with epochs=0 only the split "val" is read.
        task: its task.
        device: of training.
    """
    data: Any = task.dataset("train" if config.epochs else "val")
    count = min(_ITEMS, max(config.batch_size, 2), len(data))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        start = time.perf_counter()
        items = [Seeded(data, config.seed)[0, i] for i in range(count)]
        load = (time.perf_counter() - start) / count
        batch = {name: value.to(device) for name, value in default_collate(items).items()}
        if "label" in batch:
            batch["label"] = batch["label"].clamp_min(0)  # of pictures without one
        owner, seconds = task.in_float(), []
        model = owner.build()
        for network in (model, task.quantize(model)):
            network.to(device).eval()
            with torch.no_grad():
                seconds.append(_timed(partial(owner.loss, network, batch), device) / count)
            learns = count > 1  # BatchNorm learns from no single picture
            seconds.append(_timed(partial(_learn, owner, network.train(), batch), device) / count if learns else 0.0)
    return Pace(load, seconds[0], seconds[2], seconds[1], seconds[3])


def _learn(task: Any, model: nn.Module, batch: Batch) -> None:
    task.loss(model, batch).backward()


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the second of two calls."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def lines(config: Config, task: Any, source: Path | None, at: Pace, done: set[str]) -> list[str]:
    """A line per stage that costs time, with the setting that changes it, and about how long it takes.

    Args:
        config: of the quantization-aware training.
        task: its task.
        source: the file of the float weights; None: timm's own, or trained.
        at: this machine's pace.
        done: stages that are kept: "float", "ptq", "qat".
    """
    owner = None if source is not None or getattr(task, "pretrained", False) else config.pretraining
    train = len(task.dataset("train")) if config.epochs or owner is not None else 0
    val = len(task.dataset("val"))
    how = task.calibration

    def loop(items: float, seconds: float) -> float:
        """Workers load while the network computes."""
        workers = config.num_workers
        return items * (max(at.load / workers, seconds) if workers else at.load + seconds)

    measuring = loop(val, at.answer_low)

    def training(run: Config, seconds: float) -> float:
        return run.epochs * loop(train, seconds) + -(-run.epochs // run.eval_every) * measuring

    def told(stage: str, seconds: float) -> str:
        return "done" if stage in done else f"about {duration(seconds)}"

    if source is not None:
        first = f"float: weights of {source}"
    elif getattr(task, "pretrained", False):
        first = "float: timm's pretrained weights"
    else:
        assert owner is not None
        weights = task.weights or owner.task.weights  # type: ignore[attr-defined]
        start = f"from {weights}" if weights else "from scratch"
        first = (
            f"float: trained {start}, {owner.epochs} epochs of {train} items (pretraining.epochs={owner.epochs};"
            f" --checkpoint FLOAT.pt leaves it out): {told('float', training(owner, at.learn))}"
        )
    inputs = min(how.pictures + HELD_OUT, task.inputs_count())
    calibrating = _PASSES * inputs * (at.load + at.answer_low) + 3 * measuring
    learned = ", and what learning the rounding takes" if how.rounding == "learned" and "ptq" not in done else ""
    teaching = at.answer if getattr(task, "distill", 0) else 0.0
    trained = training(config, passes(config) * at.learn_low + teaching)
    return [
        "plan:",
        f"  {first}",
        f"  calibration: {how.pictures} inputs of {how.source or 'the training split'}, method {how.method}"
        + (", rounding learned" if how.rounding == "learned" else "")
        + f": {told('ptq', calibrating)}{learned}",
        f"  training: {config.epochs} epochs of {train} items, {config.batch_size} at a time (epochs={config.epochs}):"
        f" {told('qat', trained)}"
        if config.epochs
        else "  training: none (epochs=0)",
        f"  file: written, checked and measured: about {duration(_FILE + how.pictures * at.answer + 2 * measuring)}",
        f"  each stage is measured on {val} items, about {duration(measuring)} a time, which is counted above",
    ]


def passes(config: Config) -> float:
    """Forward-backward passes per step, as far as the settings tell: 2 where only the run itself will."""
    if config.sharpness is None:
        return 1.0
    given = getattr(config.sharpness, "keywords", {})
    default = 1.2 if getattr(config.sharpness, "func", config.sharpness) is ARSAM and "sampling" not in given else 2.0
    return float(given.get("passes") or default)


def duration(seconds: float) -> str:
    """In the unit that fits: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
