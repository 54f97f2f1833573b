"""A run of the stages, and what of it is kept for another that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks import checkpoint, engine, folder, log
from tasks.config import Config, describe
from tasks.errors import UserError
from tasks.quant.lowbit import LowBit
from tasks.quant.report import METRICS
from tasks.quant.work import size_in_bits

KEPT = "stages.json"  # what is done
CALIBRATED, PTQ, QAT = MODELS = "calibrated.pt", "ptq.pt", "qat.pt"  # of stages that are done


@dataclass
class Run:
    """Where the stages run.

    Args:
        config: of the quantization-aware training; its task gives the bits. With epochs=0 nothing is trained.
        out: folder.
        device: of training.
        name: of the config, for the records.
        float_checkpoint: to start from; None: the task's own weights, or the config's float training.
        resume: stages that are done are kept.
        say: called with a line of progress.
    """

    config: Config
    out: Path
    device: torch.device
    name: str
    float_checkpoint: Path | None = None
    resume: bool = False
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if not isinstance(self.config.task, LowBit) or not self.config.task.quantized:
            raise UserError(f"{self.name}: not a config with task.weight_bits and task.act_bits")
        self.task: Any = self.config.task
        self.stages: dict[str, Any] = {}
        self._told = {"config": describe(self.config), "float": str(self.float_checkpoint)}

    def take_up(self) -> None:
        """Read what is done, or begin.

        Raises:
            UserError: what is there is of another config.
        """
        path = self.out / KEPT
        if self.resume and path.is_file():
            self.stages = self._kept(path)
        else:
            for name in MODELS:  # of another run, which gives way
                (self.out / name).unlink(missing_ok=True)
            self.keep()

    def _kept(self, path: Path) -> dict[str, Any]:
        try:
            kept = dict(json.loads(path.read_bytes()))
            told = kept.pop("of")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not written by this tool ({type(error).__name__}); name another --out") from error
        if told != self._told:
            raise UserError(f"{path}: of another config or float checkpoint; name another --out")
        return kept

    def kept_model(self, name: str, model: nn.Module) -> bool:
        """Fill a model from the file of a stage that is done; False: it is not."""
        if not (self.out / name).is_file():
            return False
        checkpoint.load_weights(model, self.out / name)
        return True

    def keep_model(self, name: str, model: nn.Module) -> None:
        """Write down what there is to say of a stage, then its model, which says that it is done."""
        self.keep()
        checkpoint.save(self.out / name, {"model": model.state_dict()})

    def keep(self) -> None:
        """Write down what is done."""
        with folder.required(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            log.write_json(self.out / KEPT, {"of": self._told, **self.stages})

    def measure(self, stage: str, model: nn.Module) -> None:
        """The metric on the validation split, and the size of the weights stored in their bits; once."""
        if stage not in self.stages:
            figures = engine.evaluate(self.config, model, self.device)
            self.stages[stage] = {self.task.metric: figures[self.task.metric], "size_mb": size_in_bits(model) / 8e6}
            self.keep()

    def shown(self, stage: str) -> str:
        """A stage's figure."""
        return f"{self.stages[stage][self.task.metric]:.4f}"

    @property
    def title(self) -> str:
        """The metric's name."""
        return str(METRICS.get(self.task.metric, self.task.metric))
