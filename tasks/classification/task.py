"""Image classification with timm's models, in float or fake-quantized, as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks import checkpoint, distributed, loading
from tasks.classification import data
from tasks.errors import UserError
from tasks.pictures import normalised
from tasks.quant.lowbit import LowBit, has_quantizers
from tasks.task import Batch


@dataclass(frozen=True)
class Classification(LowBit):
    """Learn to classify, and measure top-1.

    Args:
        root: data, see `data.images`; "digits" for the sample.
        limit: the first N images of each split, in a fixed random order; None: all.
        skip_broken: leave out the pictures that cannot be read, which are listed, instead of stopping at the first; reads
            every picture once, before training.
        held_out: share of the training pictures, in [0, 1), that training goes without and that stand for the split "val":
            for choosing settings; 0: the split "val" itself.
        model: a timm model.
        model_args: what timm.create_model gets besides, such as {"drop_path_rate": 0.1}.
        classes: number of classes.
        stem: "model" leaves the first layers alone; "small" gives a resnet a 3x3 convolution of stride 1 and no pooling.
        side: of the crops, in pixels.
        weight_bits: as of `LowBit`, and so act_bits, layers, asymmetric and perturb.
        weights: checkpoint to start from: float, of ours or a plain timm state_dict, or one with these quantizers.
        label_smoothing: in [0, 1).
        mixup: alpha of the Beta distribution; 0: off.
        cutout: side of one square hole in training crops; 0: none.
        distill: share of the loss that is the distance to the float model of `teacher`, in [0, 1].
        teacher: its checkpoint.
    """

    root: str = "data/cifar10"
    limit: int | None = None
    skip_broken: bool = False
    held_out: float = 0.0
    model: str = "resnet18"
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: int = 10
    stem: Literal["model", "small"] = "model"
    side: int = 32
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutout: int = 0
    distill: float = 0.0
    teacher: str | None = None

    name = "quant"
    metric = "top1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie in [0, 1], got {self.distill}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {self.limit}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}")

    def dataset(self, split: str) -> data.Images:
        """Augmented crops of "train", plain ones of "val"."""
        training = split == "train"
        source = "train" if self.held_out else split
        found = self._images(source, cutout=self.cutout if training else 0, augment=training, limit=self.limit)
        return found.part(self.held_out, last=not training) if self.held_out else found

    def _images(self, split: str, *, cutout: int, augment: bool, limit: int | None) -> data.Images:
        found = data.images(
            self.root, split, side=self.side, cutout=cutout, augment=augment, limit=limit, skip_broken=self.skip_broken
        )
        if found.classes > self.classes:
            raise UserError(f"task.classes: {self.root} holds {found.classes} classes in {split}, got {self.classes}")
        return found

    def crops(self, count: int, *, augment: bool) -> Tensor:
        """The first training images, plain or as training sees them, normalised, [count, 3, side, side]."""
        cutout = self.cutout if augment else 0
        limit = count if self.limit is None else min(count, self.limit)
        images = self._images("train", cutout=cutout, augment=augment, limit=limit)
        seeded = loading.Seeded(images, seed=0)
        return normalised(torch.stack([seeded[0, i]["image"] for i in range(len(images))]))

    def example(self) -> Tensor:
        """An input of the model."""
        return torch.zeros(1, 3, self.side, self.side)

    def in_float(self) -> Classification:
        """The task of the float model, from scratch and without a teacher."""
        return replace(super().in_float(), distill=0.0)

    def starting(self, weights: Path, teacher: Path) -> Classification:
        """The task of the training, with its teacher if it has one."""
        return replace(super().starting(weights, teacher), teacher=str(teacher) if self.distill else None)

    def build(self) -> nn.Module:
        """The timm model, with the weights of a file, and quantizers if bits are given."""
        saved = checkpoint.weights(Path(self.weights)) if self.weights is not None else None
        model = self._float()
        if saved is not None and not has_quantizers(saved):
            checkpoint.fill(model, saved, Path(str(self.weights)))
        model = self.loaded(model, saved)
        if self.distill:
            if self.teacher is None:
                raise UserError("task.distill: needs task.teacher, the checkpoint of a float model")
            teacher = replace(self, weight_bits=None, act_bits=None, weights=self.teacher, distill=0.0).build()
            # Not registered: the teacher is neither trained nor saved.
            object.__setattr__(model, "teacher", [teacher.eval().requires_grad_(False)])
        return model

    def _float(self) -> nn.Module:
        if not timm.is_model(self.model):
            close = get_close_matches(self.model, timm.list_models(), n=3)
            raise UserError(
                f"task.model: timm knows no model {self.model}" + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        try:
            model: Any = timm.create_model(self.model, num_classes=self.classes, **self.model_args)
        except TypeError as e:
            raise UserError(f"task.model_args: {self.model} does not take {self.model_args}: {e}") from e
        if self.stem == "small":
            # ResNets have conv1 and maxpool, those of the second version a stem of conv and pool.
            first, convolution, pool = (model.stem, "conv", "pool") if hasattr(model, "stem") else (model, "conv1", "maxpool")
            if not (hasattr(first, convolution) and hasattr(first, pool)):
                raise UserError(f'task.stem: "small" is for resnets, {self.model} has no {convolution} and {pool}')
            conv = nn.Conv2d(3, getattr(first, convolution).out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            setattr(first, convolution, conv)
            setattr(first, pool, nn.Identity())
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, mixed with the distance to the teacher."""
        images, labels = normalised(batch["image"]), batch["label"]
        targets = F.one_hot(labels, self.classes).float()
        if self.mixup:
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            images = share * images + (1 - share) * images.flip(0)
            targets = share * targets + (1 - share) * targets.flip(0)
        logits = model(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self.distill:
            owner: Any = getattr(model, "module", model)
            with torch.no_grad():
                teacher = owner.teacher[0](images).float()
            distance = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
            loss = (1 - self.distill) * loss + self.distill * distance
        return loss

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """Top-1 and top-5 as shares, and the mean cross-entropy."""
        logits, labels = [], []
        for batch in batches:
            logits.append(model(normalised(batch["image"])).float())
            labels.append(batch["label"])
        return scores(torch.cat(distributed.gathered(logits)), torch.cat(distributed.gathered(labels)))


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of a whole split."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return {
        "top1": float(best[:, 0].float().mean()),
        "top5": float(best.any(dim=1).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }
