"""Configs: a frozen dataclass in a Python module, loaded by path, changed by `name=value` overrides.

What is built later is a `functools.partial`, so a config can be read, compared and printed without building anything.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

import arsam
from tasks import schedule as schedules
from tasks.errors import UserError
from tasks.override import override
from tasks.schedule import Epochs
from tasks.task import Task

__all__ = ["Config", "Epochs", "data_path", "describe", "differences", "load", "override"]


@dataclass(frozen=True)
class Config:
    """One training run.

    Args:
        task: what is learned and how it is measured.
        optimizer: called with the parameters.
        sharpness: called with the optimizer and the model: ``partial(ARSAM, rho=...)``; None is the baseline.
        schedule: called with (step, total steps), returns the factor of the learning rate.
        epochs: passes over the training split, >= 1; 0, in quantize.py, calibrates alone.
        batch_size: items per step, >= 1, over all processes and micro-batches: neither changes what a run does.
        accumulate: micro-batches that a batch is cut into, to save memory, >= 1.
        seed: of initialisation, order and augmentation.
        num_workers: loader processes, at most one per core; 0 loads in the training process.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        save_every: minutes between two checkpoints in the midst of an epoch, > 0; each epoch's end has one anyway.
        log_to: where the lines of metrics.jsonl go besides: "tensorboard" (into the run's folder), "wandb" or "mlflow".
        precision: "fp32", or "bf16" or "fp16" for autocast; "fp16" scales the loss.
        channels_last: memory format of the model.
        clip_norm: the update's gradient (with ARSAM: the mixed one) is scaled down to this L2 norm; None: not clipped.
        patience: steps in a row that may be left out because of NaN or inf, >= 0; then the run stops.
        ema: decay per step of the averaged weights that are evaluated; None: no average.
        pretraining: the run whose weights this one starts from, where a tool is given none; its task is this config's in
            float, with weights of its own to start from.
    """

    task: Task
    optimizer: Callable[..., Optimizer]
    sharpness: Callable[..., arsam.ARSAM] | None = None
    schedule: Callable[..., float] = schedules.cosine
    epochs: int = 1
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    num_workers: int = 2
    eval_every: int = 1
    save_every: float = 15.0
    log_to: Literal["tensorboard", "wandb", "mlflow"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    clip_norm: float | None = None
    patience: int = 10
    ema: float | None = None
    pretraining: Config | None = None

    def __post_init__(self) -> None:
        leasts = {"epochs": 0, "batch_size": 1, "accumulate": 1, "num_workers": 0, "eval_every": 1, "patience": 0, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
            if name != "seed" and getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be below 2**31, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not self.save_every > 0:
            raise ValueError(f"save_every must be > 0 minutes, got {self.save_every}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie in (0, 1), got {self.ema}; None switches it off")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}; None switches it off")


def load(path: str, *, sample: bool = False) -> Config:
    """The `config` of a config file, or its `sample`: the same run shrunk to the embedded sample data.

    Raises:
        UserError: no such file, the file raises, or it has no such variable.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; see configs/")
    spec = importlib.util.spec_from_file_location(f"config {path}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config is a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass of the config's own looks for its annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    name = "sample" if sample else "config"
    config = getattr(module, name, None)
    if not isinstance(config, Config):
        raise UserError(f"{path}: expected a variable `{name}` that is a tasks.config.Config")
    return config


def describe(value: Any) -> Any:
    """A config as plain containers for run.json."""
    if isinstance(value, Epochs):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, functools.partial):
        arguments = {str(i): describe(a) for i, a in enumerate(value.args)}
        return {"call": value.func.__name__, **arguments, **{k: describe(v) for k, v in value.keywords.items()}}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    return getattr(value, "__name__", repr(value))


# What changes no weight: how often is looked and saved, how it is loaded and evaluated, and where the data lie.
_WEIGHTLESS = {
    "num_workers", "eval_every", "save_every", "log_to", "patience", "epochs", "flip_test", "skip_broken", "detections",
    "root", "train_annotations", "train_images", "val_annotations", "val_images",
}  # fmt: skip


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two described configs differ, save in what changes no weight; more epochs go on, in a schedule of their own."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in _WEIGHTLESS:
                yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name} was {old}, is {new}"


def data_path(root: str) -> Path:
    """The folder `root`; where ARSAM_DATA is set, it stands for a leading ``data``."""
    try:
        path = Path(root).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"{root}: {error}") from error
    replacement = os.environ.get("ARSAM_DATA")
    if replacement and not path.is_absolute() and path.parts[:1] == ("data",):
        return Path(replacement).joinpath(*path.parts[1:])
    return path
