"""Image classification data, by timm's readers: ImageNet-style folders, tars of them, torchvision's CIFAR, and a sample.

# items: image [3, h, w] uint8 RGB and label, 0-dim int64
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as tv

from tasks import pictures
from tasks.config import data_path
from tasks.errors import UserError

DIGITS = "digits"  # the root that stands for scikit-learn's handwritten digits, which come with its wheel
_SMALL = 64  # crops up to this side are padded and shifted, as is usual on CIFAR; larger ones resized at random


class Images(Dataset[dict[str, Tensor]]):
    """The pictures of one split, in an order of their own, so that the first N are of all classes.

    Args:
        source: (picture, label) pairs, a picture as PIL image.
        transform: picture -> [3, h, w] uint8.
        limit: the first N; None: all.
        skip_broken: leave out the pictures that cannot be read.
    """

    def __init__(
        self, source: Any, transform: Callable[[Image.Image], Tensor], limit: int | None, skip_broken: bool = False
    ) -> None:
        self._source = source
        self._transform = transform
        order = np.random.default_rng(0).permutation(len(source))
        if skip_broken and isinstance(source, _Files):
            order = order[np.array(pictures.readable(source.names(), source.__getitem__))[order]]
            if not len(order):
                raise UserError(f"{source.root}: none of its pictures can be read")
        self._order = order[:limit]
        self.classes: int = source.classes if isinstance(source, (_Files, _Digits)) else len(source.classes)

    def part(self, share: float, *, last: bool) -> Images:
        """The last share of the pictures, or those before it; one at least."""
        cut = min(len(self) - 1, max(1, len(self) - round(share * len(self))))
        chosen = copy.copy(self)
        chosen._order = self._order[cut:] if last else self._order[:cut]
        return chosen

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture, label = self._source[int(self._order[index])]
        return {"image": self._transform(picture.convert("RGB")), "label": torch.tensor(int(label))}


def images(
    root: str, split: str, *, side: int, cutout: int = 0, augment: bool, limit: int | None, skip_broken: bool = False
) -> Images:
    """The split "train" or "val" of a data set.

    Args:
        root: "digits", or a folder with train.tar and test.tar or val.tar, with train/ and val/, or of torchvision's CIFAR.
        split: "train" or "val".
        side: of the square crop, in pixels.
        cutout: side of one square hole in training crops, in pixels; 0: none (arXiv 1708.04552).
        augment: random crop and mirror image.
        limit: the first N; None: all.
        skip_broken: leave out the pictures that cannot be read, which are listed; reads every picture once.

    Raises:
        UserError: no such data.
    """
    source = _Digits(split) if root == DIGITS else _source(data_path(root), split)
    mirror = root != DIGITS  # a mirrored digit is another digit, or none
    return Images(source, _transform(side, cutout, augment, mirror), limit, skip_broken)


def _source(root: Path, split: str) -> Sized:
    from timm.data.dataset_factory import create_dataset
    from torchvision import datasets

    names = ("train",) if split == "train" else ("val", "validation", "test")
    try:
        for name in names:
            if (root / f"{name}.tar").is_file():
                # No cache of the tar's index: timm would write it, and read it back, as a pickle.
                return _Files(create_dataset("", str(root / f"{name}.tar"), cache_tarinfo=False), root / f"{name}.tar")
            if (root / name).is_dir():
                return _Files(create_dataset("", str(root / name)), root / name)
        for folder, kind in (("cifar-10-batches-py", datasets.CIFAR10), ("cifar-100-python", datasets.CIFAR100)):
            if (root / folder).is_dir():
                return kind(str(root), train=split == "train", download=False)  # checks the files' MD5 before it unpickles
    except (RuntimeError, OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{root}: {error}") from error
    raise UserError(
        f"{root}: no images found; expected {' or '.join(f'{n}.tar or {n}/' for n in names)} with one folder per class,"
        " or torchvision's CIFAR; see README, section Data, or try --sample"
    )


class _Files:
    """What timm finds in a folder or a tar. Its own data set puts the next picture in the place of one it cannot open."""

    def __init__(self, found: Any, root: Path) -> None:
        self.root = root
        self._reader = found.reader
        labels = getattr(self._reader, "class_to_idx", None)  # of folders
        self.classes = len(self._reader.class_name_to_idx if labels is None else labels)

    def __len__(self) -> int:
        return len(self._reader)

    def names(self) -> list[str]:
        return [str(self.root / name) for name in self._reader.filenames()]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with pictures.named(self.root / self._reader.filename(index)):
            file, label = self._reader[index]
            with file, Image.open(file) as picture:
                return picture.convert("RGB"), label


class _Digits:
    """1,797 digits of 8x8; every fifth is for validation."""

    classes = 10

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        mine = (np.arange(len(bunch.target)) % 5 == 0) == (split == "val")
        self._pictures = (bunch.images[mine] * 15.9).astype(np.uint8)
        self._labels = bunch.target[mine]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pictures[index]), int(self._labels[index])


def _transform(side: int, cutout: int, augment: bool, mirror: bool) -> Callable[[Image.Image], Tensor]:
    if side <= _SMALL:
        steps: list[Any] = [tv.Resize((side, side), antialias=True)]
        if augment:
            steps.append(tv.RandomCrop(side, padding=side // 8))
    elif augment:
        steps = [tv.RandomResizedCrop(side, antialias=True)]
    else:
        steps = [tv.Resize(round(side / 0.875), antialias=True), tv.CenterCrop(side)]
    if augment and mirror:
        steps.append(tv.RandomHorizontalFlip())
    steps.append(tv.PILToTensor())
    if augment and cutout:
        steps.append(_Cutout(cutout))
    return tv.Compose(steps)


class _Cutout:
    """A black square, its centre anywhere in the picture."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, picture: Tensor) -> Tensor:
        y, x = (int(torch.randint(size, ())) for size in picture.shape[1:])
        half = self._side // 2
        picture[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return picture
