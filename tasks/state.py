"""What a run changes: model, average, optimizer, loss scale, and where it stands. All of it is in a checkpoint."""

# torch's foreach functions are public by use, underscore and all
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from arsam import ARSAM
from tasks import checkpoint, distributed
from tasks.config import Config, describe
from tasks.errors import UserError
from tasks.loading import Batches
from tasks.schedule import in_steps
from tasks.task import Task


@dataclass
class Progress:
    """Where a run stands, between two steps."""

    step: int = 0
    passes: int = 0  # forward-backward passes so far
    skipped: int = 0  # steps left out because of NaN or inf
    skipped_in_a_row: int = 0
    epoch_loss: float = 0.0  # sum over the steps of the present epoch, those left out not counted
    epoch_passes: int = 0
    epoch_skipped: int = 0
    epoch_seconds: float = 0.0
    epoch_seconds_waiting: float = 0.0  # seconds in which the next batch was not there yet
    seconds: float = 0.0  # spent in training steps, evaluation left out
    best: float | None = None

    def skip(self) -> None:
        """The present step is left out."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.epoch_skipped += 1

    def check(self) -> None:
        """See that a run can stand there.

        Raises:
            TypeError, ValueError: a value of another type, or one that no run can have.
        """
        for name, value in asdict(self).items():
            whole = name in ("step", "passes", "skipped", "skipped_in_a_row", "epoch_passes", "epoch_skipped")
            if (name, value) == ("best", None):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"progress: {name} is {value!r}")
            if name not in ("best", "epoch_loss") and not 0 <= value < math.inf:
                raise ValueError(f"progress: {name} is {value!r}")
        if self.step > self.passes:
            raise ValueError(f"progress: {self.passes} passes in {self.step} steps")

    def new_epoch(self) -> None:
        """Start the counts of an epoch."""
        self.epoch_passes = self.epoch_skipped = 0
        self.epoch_loss = self.epoch_seconds = self.epoch_seconds_waiting = 0.0


class Average:
    """Exponential moving average of a model's weights and statistics: a <- decay a + (1 - decay) w.

    The first update copies. torch's AveragedModel gives the same numbers, and asks the device for its count on each step.

    Args:
        model: averaged.
        decay: per step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.count = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model as it is now."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        if self.count:
            floats: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
            for a, w in pairs:
                if a.is_floating_point():
                    floats.setdefault(a.dtype, []).append((a, w))
                else:
                    a.copy_(a * self._decay + w * (1 - self._decay))
            for group in floats.values():
                torch._foreach_lerp_([a for a, _ in group], [w for _, w in group], 1 - self._decay)
        else:
            torch._foreach_copy_([a for a, _ in pairs], [w for _, w in pairs])
        self.count += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class State:
    """Model, average, optimizer, loss scale and progress of a run, as built from its config.

    Args:
        config: of the run.
        batches: of the run, whose number the schedule and the sampling rules are given.
        device: of the model.

    Raises:
        UserError: the model or the optimizer cannot be built.
    """

    def __init__(self, config: Config, batches: Batches, device: torch.device) -> None:
        self._config = config
        self._batches = batches
        self.device = device
        self.model = build_model(config.task).to(device).to(memory_format=memory_format(config))
        self.average = Average(self.model, config.ema) if config.ema else None
        self.trained = distributed.parallel(self.model, device)
        self.optimizer = build_optimizer(config, self.trained, batches.per_epoch)
        self.scaler = GradScaler(device.type, enabled=config.precision == "fp16")
        self.progress = Progress()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the present epoch
        self._factor = partial(in_steps(config.schedule, batches.per_epoch), total_steps=batches.total)
        self._check_schedule()

    @property
    def evaluated(self) -> nn.Module:
        """The model whose metrics count: the average where there is one."""
        return self.average.module if self.average is not None else self.model

    def _check_schedule(self) -> None:
        try:
            factor = self._factor(0)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"schedule: {error}") from error
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise UserError(f"schedule: gives the factor of the learning rate, a number; of the first step it gave {factor!r}")

    def set_rate(self) -> None:
        """Give the optimizer the learning rate of the present step."""
        factor = self._factor(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def new_epoch(self) -> None:
        """Start the counts of an epoch."""
        self.progress.new_epoch()
        self.loss_sum.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, the generators of all processes among them."""
        self.progress.epoch_loss = self.loss_sum.item()
        return {
            "config": describe(self._config),
            "items": self._batches.items,
            "about": getattr(self._config.task, "about", dict)(),  # what whoever uses the weights must know
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "averaged": self.average.count if self.average is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": distributed.gathered([torch.get_rng_state()]),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError: it is not of this config.
        """
        if saved.get("items", self._batches.items) != self._batches.items:
            raise UserError(f"the run was begun with {saved['items']} training items, here are {self._batches.items}")
        self.model.load_state_dict(saved["model"])
        if (name := checkpoint.not_finite(self.model)) is not None:
            raise ValueError(f"NaN or inf in {name}")
        if self.average is not None:
            self.average.module.load_state_dict(saved["average"])
            self.average.count = int(saved["averaged"])
        own = self.optimizer.state_dict().get("arsam")
        if own is not None and saved["config"]["epochs"] != self._config.epochs:
            # The configs agree, and so do the rules, but for the number of steps that some are given.
            saved["optimizer"]["arsam"]["rules"] = own["rules"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if distributed.rank() < len(saved["rng"]):
            torch.set_rng_state(saved["rng"][distributed.rank()])
        if torch.cuda.is_available() and saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        self.progress = Progress(**saved["progress"])
        self.progress.check()
        self.loss_sum.fill_(self.progress.epoch_loss)


def memory_format(config: Config) -> torch.memory_format:
    """The memory format that the config's model is kept in."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def build_model(task: Task) -> nn.Module:
    """A task's network.

    Raises:
        UserError: it cannot be built with these settings.
    """
    try:
        return task.build()
    except UserError:
        raise
    except Exception as error:  # a network of anybody's, with settings of anybody's
        what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise UserError(f"task: the network cannot be built with these settings: {what}") from error


def build_optimizer(config: Config, model: nn.Module, steps_per_epoch: int) -> Optimizer:
    """The config's optimizer, sharpness-aware where the config says so.

    `sampling` and `reuse` come as partials and are built here: rules that take ``total_steps`` are given it. `rho_warmup`
    may be a share of the run, a number between 0 and 1.

    Raises:
        UserError: an argument is missing or out of range.
    """
    try:
        optimizer = config.optimizer(config.task.parameters(getattr(model, "module", model)))
        return optimizer if config.sharpness is None else _sharpen(config, optimizer, model, steps_per_epoch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer or sharpness: {error}") from error


def _sharpen(config: Config, optimizer: Optimizer, model: nn.Module, steps_per_epoch: int) -> ARSAM:
    sharpness = in_steps(config.sharpness, steps_per_epoch)
    rules: dict[str, Any] = {}
    for name in ("sampling", "reuse"):
        rule = sharpness.keywords.get(name) if isinstance(sharpness, partial) else None
        if rule is not None:
            rule = in_steps(rule, steps_per_epoch)
            takes_total = "total_steps" in inspect.signature(rule).parameters
            rules[name] = rule(total_steps=steps_per_epoch * config.epochs) if takes_total else rule()
    rise = sharpness.keywords.get("rho_warmup", 0) if isinstance(sharpness, partial) else 0
    if 0 < rise < 1:
        rules["rho_warmup"] = round(rise * steps_per_epoch * config.epochs)
    return sharpness(optimizer, model=model, **rules)
