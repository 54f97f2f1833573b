"""Comparisons on larger machines: the rows in place of a config's sharpness, in folders as `tools/train.py` makes them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.schema import Large, Row, Settings, Setup
from tasks import distributed, engine
from tasks.config import Config


def configured(suite: Large, row: Row, seed: int, settings: Settings, ascents: float, split: str) -> Config:
    """The run of a row: the suite's config with the row's sharpness and factors.

    Args:
        suite: the workload.
        row: the optimizer.
        seed: of the run.
        settings: "rho" and others; "lr", "weight_decay" and "epochs" are factors on the config's.
        ascents: share of the steps that ascend, for rules that are given one.
        split: "test": the task's own; "val": a share of the training split that training goes without.
    """
    values = {**row.settings, **settings}
    config: Any = suite.config
    if split == "val":
        config = replace(config, task=replace(config.task, held_out=suite.held_out))
    optimizer = config.optimizer.keywords
    factors = {name: optimizer[name] * values[name] for name in ("lr", "weight_decay") if name in values}
    whole = suite.tune_epochs if split == "val" and suite.tune_epochs is not None else config.epochs
    epochs = max(1, round(whole * values.get("epochs", 1.0)))
    items = len(config.task.dataset("train"))
    per_epoch = items // min(config.batch_size, items)
    sharpen = row.sharpen(Setup(per_epoch * epochs, per_epoch, seed, ascents, values)) if row.sharpen is not None else None
    return replace(
        config,
        sharpness=sharpen,
        optimizer=partial(config.optimizer, **factors),
        epochs=epochs,
        eval_every=epochs,
        seed=seed,
        ema=config.ema if row.ema is None else row.ema,
    )


def run(
    suite: Large, row: Row, seed: int, settings: Settings, ascents: float, split: str, device: torch.device, out: Path
) -> dict[str, Any]:
    """Train a row once, or go on where that was interrupted; the figures that are recorded.

    Args:
        suite: the workload.
        row: the optimizer.
        seed: of the run.
        settings: as chosen for the row.
        ascents: share of the steps that ascend, for rules that are given one.
        split: that is evaluated.
        device: where.
        out: folder of the suite's runs.
    """
    config = configured(suite, row, seed, settings, ascents, split)
    chosen = "-".join(f"{name}{value:g}" for name, value in settings.items())
    folder = out / "-".join(x for x in (row.name, split, chosen, str(seed)) if x)
    resume = distributed.first((folder / "last.pt").exists())
    result = engine.train(config, folder, device=device, resume=resume, name=f"{suite.name} {row.name}")
    return {
        suite.metric: result["metrics"][suite.metric],
        "steps": result["steps"],
        "ascents": result["ascents"],
        "passes_per_step": 1 + row.part * result["ascents"] / result["steps"],
        "train_seconds": result["train_seconds"],
        "peak_memory_mb": result["peak_memory_mb"],
    }
