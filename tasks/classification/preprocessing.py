"""What becomes of a picture before the network sees it: size, crop, channels, augmentation, mean and standard deviation.

# pictures are PIL's, h w the network's size in pixels, c its channels; mean and std are of values from 0 to 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

from tasks.pictures import MEAN, STD, normalised

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> as Pillow calls them
INTERPOLATIONS = tuple(mode.value for mode in tv.InterpolationMode)
_SMALL = (
    64  # pictures up to this side are seen whole, and padded and shifted, as is usual on CIFAR; larger ones resized at random
)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    Args:
        size: (h, w).
        crop: share of the picture's shorter side that is kept, in (0, 1]: it is resized to cover size / crop, and the centre
            is cut out. None: the whole picture is stretched to the size.
        interpolation: of resizing, one of INTERPOLATIONS.
        mean: of each channel.
        std: standard deviation of each channel.
    """

    size: tuple[int, int]
    crop: float | None = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"side must be >= 1, got {self.size}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie in (0, 1], got {self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if len(self.mean) not in MODES or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have 1, 3 or 4 values, as many as channels, got {self.mean} and {self.std}")
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std must be finite, and std > 0, got {self.mean} and {self.std}")

    @property
    def channels(self) -> int:
        """c."""
        return len(self.mean)

    @property
    def cover(self) -> tuple[int, int]:
        """The size that a picture is resized to cover, or is stretched to, (h, w)."""
        h, w = self.size
        return self.size if self.crop is None else (int(h / self.crop), int(w / self.crop))

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, c, h, w] as the network takes it."""
        return normalised(images, self.mean, self.std)

    def transform(self, *, augment: bool = False, mirror: bool = True, cutout: int = 0) -> Callable[[Image.Image], Tensor]:
        """From a picture to [c, h, w] uint8.

        Args:
            augment: random crop and mirror image, as training wants them.
            mirror: False leaves the mirror image out.
            cutout: side of one square hole in augmented crops, in pixels; 0: none (arXiv 1708.04552).
        """
        how = tv.InterpolationMode(self.interpolation)
        steps: list[Any]
        if augment and max(self.size) <= _SMALL:
            steps = [tv.Resize(self.size, how, antialias=True), tv.RandomCrop(self.size, padding=min(self.size) // 8)]
        elif augment:
            steps = [tv.RandomResizedCrop(self.size, interpolation=how, antialias=True)]
        elif self.crop is None:
            steps = [tv.Resize(self.size, how, antialias=True)]
        else:
            steps = [_Cover(self.cover, how), tv.CenterCrop(self.size)]
        if augment and mirror:
            steps.append(tv.RandomHorizontalFlip())
        steps.append(tv.PILToTensor())
        if augment and cutout:
            steps.append(_Cutout(cutout))
        return tv.Compose([_Channels(MODES[self.channels]), *steps])

    def about(self) -> dict[str, Any]:
        """As plain containers, for a checkpoint and a file's metadata."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "size": list(self.size),
            "resize": list(self.cover),
            "resize_mode": "stretch" if self.crop is None else "cover",
            "crop": self.crop,
            "interpolation": self.interpolation,
            "color": MODES[self.channels],
        }

    def __str__(self) -> str:
        h, w = self.size
        whole = f"stretched to {h}x{w}" if self.crop is None else f"{h}x{w} in the centre of {self.cover[0]}x{self.cover[1]}"
        numbers = ", ".join(
            f"{name} {'/'.join(f'{v:g}' for v in values)}" for name, values in (("mean", self.mean), ("std", self.std))
        )
        return f"{MODES[self.channels]}, {whole}, {self.interpolation}, {numbers}"


def of_model(
    cfg: Mapping[str, Any],
    size: tuple[int, int],
    channels: int,
    *,
    crop: float | None = None,
    interpolation: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing:
    """The preprocessing that a pretrained network is used to, but for what is given.

    Args:
        cfg: timm's pretrained_cfg, or {} where there is none.
        size: (h, w); pictures up to 64 pixels are seen whole, without the network's crop.
        channels: 1, 3 or 4. From the three values of RGB, one is their mean, and the fourth, of alpha, too.
        crop: None: the network's, which may be another at the size that it is evaluated at; the whole picture for networks
            that were trained on stretched ones.
        interpolation: None: the network's.
        mean: None: the network's.
        std: None: the network's.
    """

    def fitted(values: tuple[float, ...]) -> tuple[float, ...]:
        centre = sum(values) / len(values)
        return values if len(values) == channels else (centre,) if channels == 1 else (*values, centre)[:channels]

    whole = max(size) <= _SMALL or (cfg.get("crop_mode") == "squash" and float(cfg.get("crop_pct", 0.0)) == 1)
    larger = tuple(cfg.get("test_input_size") or ())[1:] == size and cfg.get("test_crop_pct") is not None
    own = float(cfg["test_crop_pct" if larger else "crop_pct"]) if "crop_pct" in cfg else 0.875
    return Preprocessing(
        size,
        crop if crop is not None else None if whole else own,
        interpolation or str(cfg.get("interpolation", "bilinear")),
        tuple(mean) if mean is not None else fitted(tuple(cfg.get("mean", MEAN))),
        tuple(std) if std is not None else fitted(tuple(cfg.get("std", STD))),
    )


class _Channels:
    """A picture in the network's channels; 16 bits are scaled to 8, which Pillow would cut off at 255 instead."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def __call__(self, picture: Image.Image) -> Image.Image:
        if picture.mode.startswith("I"):
            values = np.asarray(picture).astype(np.float64)
            top = 65535 if picture.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
            picture = Image.fromarray((values.clip(0, top) * (255 / top) + 0.5).astype(np.uint8))
        return picture.convert(self._mode)


class _Cover:
    """Resize to cover a size (h, w), with the picture's own proportions; never an edge shorter than the size."""

    def __init__(self, size: tuple[int, int], how: tv.InterpolationMode) -> None:
        self._size = size
        self._how = how

    def __call__(self, picture: Image.Image) -> Image.Image:
        (h, w), (width, height) = self._size, picture.size
        factor = max(h / height, w / width)
        size = [max(h, int(height * factor)), max(w, int(width * factor))]
        return tv.functional.resize(picture, size, self._how, antialias=True)  # type: ignore[return-value]


class _Cutout:
    """A black square, its centre anywhere in the picture."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, picture: Tensor) -> Tensor:
        y, x = (int(torch.randint(size, ())) for size in picture.shape[1:])
        half = self._side // 2
        picture[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return picture
