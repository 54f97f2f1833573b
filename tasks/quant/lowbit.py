"""What a task needs to be quantized: bits, and models in float and fake-quantized; the stages ask for nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from tasks import checkpoint
from tasks.errors import UserError
from tasks.quant.canonicalise import canonicalise
from tasks.quant.prepare import QuantLayer, parameter_groups, prepare
from tasks.quant.sharpness import AfterRounding
from tasks.quant.targets import TARGETS, Name

Task = TypeVar("Task", bound="LowBit")
BATCH = 64  # inputs at a time


@dataclass(frozen=True)
class Calibration:
    """How a network is quantized before, or without, training.

    Args:
        method: how a step size is chosen: "mse" by the least squared error of the values, "minmax" by the extremes,
            "percentile" by percentiles.
        percentile: of the values, 50 to 100, for that method.
        pictures: inputs that are looked at; the first of the training split.
        source: folder of pictures to look at instead; they need no labels.
        rounding: "nearest", or "learned": weights' codes by the error of the layer's output, AdaRound's objective.
        correct: put the statistics and biases right that rounding has shifted, where held-out pictures say that it helps.
    """

    method: Literal["mse", "minmax", "percentile"] = "mse"
    percentile: float = 99.99
    pictures: int = 256
    source: str | None = None
    rounding: Literal["nearest", "learned"] = "nearest"
    correct: bool = True

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"calibration.percentile must be from 50 to 100, got {self.percentile}")
        if self.pictures < 1:
            raise ValueError(f"calibration.pictures must be >= 1, got {self.pictures}")


@dataclass(frozen=True, kw_only=True)
class LowBit(ABC):
    """The settings that quantizable tasks have in common.

    Args:
        weight_bits: 2 to 8; None, with act_bits, trains in float.
        act_bits: 2 to 8.
        layers: name pattern -> (weight bits, activation bits), or None for float; the first and last layer have 8 bits.
        asymmetric: learn an offset for activations (LSQ+).
        calibration: of the network before it is trained.
        weights: checkpoint to start from; with quantizers, it holds the whole model.
        target: run time that the file is for: "ort" for ONNX Runtime; "ort-avx2" where the processor has no VNNI: 8-bit weights
            get 7 bits; "tensorrt"; "openvino". See docs/deploy.md.
        perturb: where a sharpness-aware step moves a fake-quantized weight: "latent" before rounding, "quantized" after.
    """

    weight_bits: int | None = None
    act_bits: int | None = None
    layers: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)
    asymmetric: bool = False
    calibration: Calibration = Calibration()
    weights: str | None = None
    target: Name = "ort"
    perturb: Literal["latent", "quantized"] = "latent"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            if bits is not None and bits not in range(2, 9):
                raise ValueError(f"{name} must be 2 to 8, or None for float, got {bits}")

    @property
    def quantized(self) -> bool:
        """Are layers fake-quantized?"""
        return self.weight_bits is not None and self.act_bits is not None

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Any]:
        """The split "train" or "val"."""

    @abstractmethod
    def crops(self, count: int, *, augment: bool) -> Tensor:
        """The first training inputs, plain or as training sees them, as the network takes them."""

    def inputs(self, count: int, *, augment: bool, start: int = 0) -> Iterator[Tensor]:
        """The same in batches, from input `start` on."""
        if self.calibration.source is not None:
            raise UserError("task.calibration.source: this task calibrates on its training split alone")
        return iter(self.crops(count + start, augment=augment)[start:].split(BATCH))

    def inputs_count(self) -> int:
        """How many there are."""
        data: Any = self.dataset("train")
        return len(data)

    def about(self) -> dict[str, Any]:
        """What whoever uses the weights must know, in plain containers: how inputs are made, what outputs are called."""
        return {}

    def knowing(self: Task, about: dict[str, Any]) -> Task:
        """The task as a checkpoint was made for it, where the settings leave it open."""
        return self

    @abstractmethod
    def example(self) -> Tensor:
        """An input of the network, a batch of one."""

    def in_float(self: Task) -> Task:
        """The task of the float model, from scratch."""
        return replace(self, weight_bits=None, act_bits=None, weights=None)

    def float_weights(self) -> Path | None:
        """The file of a whole float model among the settings, which needs no training of its own; None: there is none."""
        return None

    def starting(self: Task, weights: Path, teacher: Path) -> Task:
        """The task of the training that starts from a fake-quantized model; `teacher` is the float one."""
        return replace(self, weights=str(weights))

    def parameters(self, model: nn.Module) -> list[Any]:
        """The weights, last in order, so that a sampling rule monitors them; step sizes in a group that no ascent moves."""
        return parameter_groups(model)[::-1] if self.quantized else list(model.parameters())

    def loaded(self, model: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
        """A float model, which has its own weights already, with quantizers if bits are given; filled if `saved` has some."""
        if (self.weight_bits is None) != (self.act_bits is None):
            raise UserError("task.weight_bits and task.act_bits: give both, or neither for float")
        if self.quantized:
            model = self.quantize(model)
        if saved is not None and has_quantizers(saved):
            checkpoint.fill(model, saved, Path(str(self.weights)))
        return model

    def quantize(self, model: nn.Module) -> nn.Module:
        """A fake-quantized copy of a float model, step sizes not yet set."""
        assert self.weight_bits is not None
        assert self.act_bits is not None
        model = canonicalise(model, self.example())
        try:
            model = prepare(
                model, weight_bits=self.weight_bits, act_bits=self.act_bits, layers=self.layers, asymmetric=self.asymmetric
            )
            TARGETS[self.target].prepare(model)
        except ValueError as error:
            raise UserError(f"task: {error}") from error
        if self.perturb == "quantized":
            for layer in model.modules():
                if isinstance(layer, QuantLayer):
                    layer.weight_quantizer = AfterRounding(layer.weight_quantizer)  # type: ignore[assignment]
        return model


def has_quantizers(state: dict[str, Any]) -> bool:
    """Is it the state_dict of a fake-quantized model?"""
    return any(".weight_quantizer." in key for key in state)
