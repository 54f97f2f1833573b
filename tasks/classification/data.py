"""Image classification data: class folders, tars of them, CSV files, torchvision's CIFAR, a data set of one's own, a sample.

# items: image [c, h, w] uint8 and label, 0-dim int64, -1 where a picture has none
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tasks import pictures
from tasks.classification import listing
from tasks.classification.listing import Listing
from tasks.classification.preprocessing import Preprocessing, of_model
from tasks.config import data_path
from tasks.errors import UserError

DIGITS = "digits"  # the root that stands for scikit-learn's handwritten digits, which come with its wheel
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
Root = str | Callable[[str], Any]


class Images(Dataset[dict[str, Tensor]]):
    """The pictures of one split, in an order of their own, so that the first N are of all classes.

    Args:
        source: (picture, label) pairs, a picture as PIL image or as an array that PIL takes.
        transform: picture -> [c, h, w] uint8.
        limit: the first N; None: all.
        skip_broken: leave out the pictures that cannot be read.
        labels: the network's label of each of the source's; None: the same.
        outputs: of the network, which labels must be below; None: any.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[[Image.Image], Tensor],
        limit: int | None,
        skip_broken: bool = False,
        labels: list[int] | None = None,
        outputs: int | None = None,
    ) -> None:
        self._source = source
        self._outputs = outputs
        self._transform = transform
        self._labels = labels
        self.classes: tuple[str, ...] | None = class_names(source)
        order = np.random.default_rng(0).permutation(len(source))
        if skip_broken and isinstance(source, Listing):
            order = order[np.array(pictures.readable(source.names(), source.__getitem__))[order]]
            if not len(order):
                raise UserError(f"{source.root}: none of its pictures can be read")
        self._order = order[:limit]

    def part(self, share: float, *, last: bool) -> Images:
        """The last share of the pictures, or those before it; one at least."""
        cut = min(len(self) - 1, max(1, len(self) - round(share * len(self))))
        chosen = copy.copy(self)
        chosen._order = self._order[cut:] if last else self._order[:cut]
        return chosen

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture, label = self._pair(int(self._order[index]))
        label = label if self._labels is None or label < 0 else self._labels[label]
        if self._outputs is not None and label >= self._outputs:
            raise UserError(f"task.classes: {self._outputs}, but a picture has the label {label}; labels count from 0")
        return {"image": self._transform(picture), "label": torch.tensor(label)}

    def _pair(self, place: int) -> tuple[Image.Image, int]:
        """A picture and its label, of whatever the source gives.

        Raises:
            UserError: a data set of the user's own gives something else.
        """
        item = self._source[place]
        try:
            picture, label = item
            if not isinstance(picture, Image.Image):
                picture = Image.fromarray(np.asarray(picture))
            return picture, int(label)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"task.root: item {place} of {type(self._source).__name__} must be a picture (PIL's, or an array [h, w, c] of"
                f" uint8) and a whole number, its label; got {type(item).__name__} ({' '.join(str(error).split())[:100]})"
            ) from error


def images(
    root: Root,
    split: str,
    *,
    side: int | tuple[int, int] = 32,
    cutout: int = 0,
    augment: bool,
    limit: int | None,
    skip_broken: bool = False,
    preprocessing: Preprocessing | None = None,
    labels: list[int] | None = None,
) -> Images:
    """The split "train" or "val" of a data set.

    Args:
        root: "digits"; or a folder with a split as train.tar, train.csv or train/ (val and test alike), or of torchvision's
            CIFAR; or a function of the split that returns a data set of (picture, label) pairs.
        split: "train" or "val".
        side: of the crop, or (h, w), in pixels; not read with a preprocessing.
        cutout: side of one square hole in augmented crops, in pixels; 0: none.
        augment: random crop and mirror image.
        limit: the first N; None: all.
        skip_broken: leave out the pictures that cannot be read, which are listed; reads every picture once.
        preprocessing: None: ImageNet's.
        labels: as of `Images`.

    Raises:
        UserError: no such data.
    """
    if preprocessing is None:
        preprocessing = of_model({}, (side, side) if isinstance(side, int) else side, 3)
    mirror = root != DIGITS  # a mirrored digit is another digit, or none
    transform = preprocessing.transform(augment=augment, mirror=mirror, cutout=cutout)
    return Images(source(root, split), transform, limit, skip_broken, labels)


def class_names(source: Any) -> tuple[str, ...] | None:
    """Of a source's labels, in order; None: it tells none."""
    names = getattr(source, "classes", None)
    return None if names is None or isinstance(names, int) else tuple(str(name) for name in names)


def source(root: Root, split: str) -> Any:
    """The (picture, label) pairs of a split, listed once per process.

    Raises:
        UserError: no such data.
    """
    if not isinstance(root, str):
        return root(split)
    if root == DIGITS:
        return _Digits(split)
    return _source(data_path(root), split)


def pictures_in(folder: str) -> Listing:
    """All pictures of a folder, with class folders or without.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    path = data_path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of pictures")
    return _pictures_in(path)


def has_split(root: Root, split: str) -> bool:
    """Is there such data?"""
    try:
        source(root, split)
    except UserError:
        return False
    return True


@lru_cache(maxsize=8)
def _pictures_in(path: Path) -> Listing:
    return listing.of_folder(path)


@lru_cache(maxsize=8)
def _source(root: Path, split: str) -> Any:
    from torchvision import datasets

    try:
        for name in SPLITS[split]:
            if (root / f"{name}.tar").is_file():
                return listing.of_tar(root / f"{name}.tar")
            if (root / f"{name}.csv").is_file():
                return listing.of_csv(root / f"{name}.csv")
            if (root / name).is_dir():
                return listing.of_folder(root / name)
        for folder, kind in (("cifar-10-batches-py", datasets.CIFAR10), ("cifar-100-python", datasets.CIFAR100)):
            if (root / folder).is_dir():
                return kind(str(root), train=split == "train", download=False)  # checks the files' MD5 before it unpickles
    except (RuntimeError, OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{root}: {error}") from error
    raise UserError(
        f"{root}: no images found; expected {' or '.join(f'{n}.tar or {n}/' for n in SPLITS[split])} with one folder per"
        f" class, {SPLITS[split][0]}.csv with path,label, or torchvision's CIFAR; see README, section Data, or try --sample"
    )


class _Digits:
    """1,797 digits of 8x8; every fifth is for validation."""

    classes = tuple(str(digit) for digit in range(10))

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
