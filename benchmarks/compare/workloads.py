"""Data and networks of the suites: small enough for one core, held in memory.

# N images, K joints, W x H the crop
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.compare.schema import Data, Split
from tasks.classification.data import images
from tasks.pose.codec import SimCC
from tasks.pose.data import PoseData
from tasks.pose.joints import COCO
from tasks.pose.task import PoseTask
from tasks.pose.transforms import Augmentation

CODEC = SimCC((48, 64), split_ratio=1.0, sigma=2.0)


def noisy(labels: Tensor, share: float, generator: torch.Generator, classes: int = 10) -> Tensor:
    """Labels, of which a share is moved to one of the other classes."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moved = labels.clone()
    moved[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    return moved


def divided(x: Tensor, y: Tensor, train: int, held_out: int, seed: int, noise: float, test: Split | None = None) -> Data:
    """Splits of a seed; channels with mean 0 and deviation 1 on its training images.

    Args:
        x: images.
        y: labels.
        train: so many to train on.
        held_out: so many more to choose settings on.
        seed: of the division and of the noise.
        noise: share of wrong labels in "train" and in "val": whoever chooses a setting has no better labels to choose by.
        test: a split that is the same for all seeds; None: the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    parts = {"train": order[:train], "val": order[train : train + held_out]}
    splits = {name: (x[part], noisy(y[part], noise, generator) if noise else y[part]) for name, part in parts.items()}
    rest = order[train + held_out :]
    splits["test"] = test if test is not None else (x[rest], y[rest])
    pictures = splits["train"][0]
    mean, deviation = pictures.mean((0, 2, 3), keepdim=True), pictures.std((0, 2, 3), keepdim=True)
    return {name: ((a - mean) / deviation, b) for name, (a, b) in splits.items()}


def digits(seed: int, noise: float = 0.4) -> Data:
    """scikit-learn's digits, 8x8: 600 to train on, 600 held out, 597 to test on."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
    return divided(x, torch.tensor(bunch.target, dtype=torch.int64), 600, 600, seed, noise)


@cache
def _cifar16(split: str, limit: int | None) -> Split:
    items = list(images("data/cifar10", split, side=32, augment=False, limit=limit))  # type: ignore[arg-type]
    pictures = torch.stack([item["image"] for item in items]).float() / 255
    return nn.functional.avg_pool2d(pictures, 2), torch.stack([item["label"] for item in items])


def cifar16(seed: int, noise: float = 0.3) -> Data:
    """CIFAR-10 averaged down to 16x16: of 4,000 images half to train on and half held out, the 10,000 to test on.

    Raises:
        UserError: no such data.
    """
    return divided(*_cifar16("train", 4000), 2000, 2000, seed, noise, _cifar16("val", None))


@cache
def _people(split: str) -> Split:
    task = PoseTask(root="data/lspet", codec=CODEC)
    plain = Augmentation(flip=0.0, half_body=0.0, shift=0.0, scale=(1.0, 1.0), rotation=0.0)
    people = PoseData(task.dataset(split).people, CODEC, plain)
    items = [people[i] for i in range(len(people))]
    labels = [torch.cat([item["target"], item["weight"][:, None]], dim=1) for item in items]
    return torch.stack([item["image"] for item in items]).float() / 255, torch.stack(labels)


def lspet(seed: int) -> Data:
    """Leeds Sports Pose Extended: crops of 64x48, 2,000 people to train on, the 400 others held out, 600 to test on.

    Not augmented. Labels: SimCC's W + H bins and, last, the weight of the joint.

    Raises:
        UserError: no such data.
    """
    return divided(*_people("train"), 2000, 400, seed, 0.0, _people("val"))


def pose_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """SimCC's, of labels as `lspet` has them."""
    return CODEC.loss(logits, labels[..., :-1], labels[..., -1]) / len(logits)


def pck(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """How many of the labelled joints are found within a tenth of the crop's height, and of how many."""
    found, _ = CODEC.decode(logits.numpy(force=True))
    truth, _ = CODEC.decode(labels[..., :-1].numpy(force=True))
    labelled = labels[..., -1].numpy(force=True) > 0
    near = np.linalg.norm(found - truth, axis=2) < CODEC.input_size[1] / 10
    return float((near & labelled).sum()), int(labelled.sum())


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        same = stride == 1 and inner == outer
        self.short = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.short(x))


def _stages(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    """A ResNet of three stages, one block each."""
    return [
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _Block(width, width, 1),
        _Block(width, 2 * width, 2),
        _Block(2 * width, 4 * width, 2),
    ]


def network(channels: int, width: int, classes: int = 10) -> nn.Module:
    """The ResNet and a linear classifier of the mean over all places."""
    return nn.Sequential(*_stages(channels, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def dropout_network(inputs: int, width: int, share: float, classes: int = 10) -> nn.Module:
    """Three linear layers with dropout between them: the two passes of a step must draw the same masks."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (inputs, width):
        layers += [nn.Linear(before, width), nn.ReLU(inplace=True), nn.Dropout(share)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def pose_network(width: int = 16) -> nn.Module:
    """The ResNet at half the resolution, a map per joint, and a linear classifier per axis that all joints share."""
    columns, rows = CODEC.input_size
    joints = len(COCO)
    return nn.Sequential(
        *_stages(3, width, stride=2),
        nn.Conv2d(4 * width, 4 * joints, 1),
        nn.PixelShuffle(2),
        nn.Flatten(2),
        nn.Linear(columns * rows // 16, sum(CODEC.bins)),
    )
