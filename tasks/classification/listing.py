"""Which pictures a data set has, and of which class: class folders, a CSV file, a folder without classes.

# N pictures; names as one block of bytes and where each ends, since a million Python strings are a gigabyte
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks import pictures
from tasks.errors import UserError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """Pictures in files.

    Args:
        root: folder that the names are relative to.
        classes: names of the classes, in the order of their labels; None: the pictures have no labels.
        labels: [N] int32, -1 where there is none.
        block: the names, one after the other.
        ends: [N] int64, where in the block each name ends.
    """

    root: Path
    classes: tuple[str, ...] | None
    labels: NDArray[np.int32]
    block: bytes
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Of a picture, relative to the root."""
        return os.fsdecode(self.block[self.ends[index - 1] if index else 0 : self.ends[index]])

    def names(self) -> list[str]:
        """Of all pictures, whole."""
        return [str(self.root / self.name(index)) for index in range(len(self))]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture and its label.

        Raises:
            UserError: it cannot be read.
        """
        path = self.root / self.name(index)
        with pictures.named(path), Image.open(path) as picture:
            picture.load()
            return picture, int(self.labels[index])


def _listing(root: Path, classes: tuple[str, ...] | None, names: Iterable[tuple[str, int]]) -> Listing:
    labels: list[int] = []
    block, ends = bytearray(), []
    for name, label in names:
        block += os.fsencode(name)
        ends.append(len(block))
        labels.append(label)
    if not labels:
        raise UserError(f"{root}: no pictures in it; looked for {', '.join(ENDINGS)}")
    return Listing(root, classes, np.array(labels, np.int32), bytes(block), np.array(ends, np.int64))


def in_order(name: str) -> list[str | int]:
    """The key by which names with numbers in them are sorted: a2 before a10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def of_folder(root: Path) -> Listing:
    """Pictures in one folder per class, however deep; in a folder without such folders, pictures without labels.

    A class folder without a picture in it is no class.

    Raises:
        UserError: no pictures.
    """
    below = sorted((entry.name for entry in os.scandir(root) if entry.is_dir()), key=in_order)
    found = {name: list(_files(root, name)) for name in below}
    classes = tuple(name for name in below if found[name])
    if not classes:
        return _listing(root, None, ((name, -1) for name in _files(root, "")))
    return _listing(root, classes, ((name, label) for label, c in enumerate(classes) for name in found[c]))


def _files(root: Path, folder: str) -> Iterable[str]:
    for place, folders, files in os.walk(root / folder, followlinks=True):
        folders.sort(key=in_order)
        prefix = os.path.relpath(place, root)
        for name in sorted((f for f in files if f.lower().endswith(ENDINGS)), key=in_order):
            yield name if prefix == "." else f"{prefix}/{name}"
        if not folder:
            return  # without classes, the folder's own pictures alone


def of_csv(path: Path) -> Listing:
    """Pictures of a table with the columns path, relative to the table's folder, and label, the name of a class.

    Raises:
        UserError: no such columns, a row without a value, or no rows.
    """
    rows: list[tuple[str, str]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path}: expected a first line with the columns path and label, got {reader.fieldnames}")
            for row in reader:
                if not row["path"] or not row["label"]:
                    raise UserError(f"{path}: line {reader.line_num} lacks a path or a label")
                rows.append((row["path"], row["label"]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}") from error
    classes = tuple(sorted({label for _, label in rows}, key=in_order))
    labels = {name: label for label, name in enumerate(classes)}
    return _listing(path.parent, classes, ((name, labels[label]) for name, label in rows))


@dataclass(frozen=True)
class Packed(Listing):
    """Pictures in a tar, read from where they lie in it: nothing stays open, so that processes do not share a place in it.

    Args:
        spans: [N, 2] int64, where in the tar a file begins, and its size, in bytes.
    """

    spans: NDArray[np.int64]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture and its label.

        Raises:
            UserError: it cannot be read.
        """
        with pictures.named(self.root / self.name(index)), open(self.root, "rb") as file:
            start, size = self.spans[index].tolist()
            file.seek(start)
            with Image.open(io.BytesIO(file.read(size))) as picture:
                picture.load()
                return picture, int(self.labels[index])


def of_tar(path: Path) -> Packed:
    """Pictures of a tar that is not compressed, with a folder per class: the last folder of a path is the class.

    Raises:
        UserError: no pictures.
        tarfile.TarError: not such a tar.
    """
    with tarfile.open(path, "r:") as tar:
        found = [(entry.name, entry.offset_data, entry.size) for entry in tar if entry.isfile()]
    found = sorted((f for f in found if f[0].lower().endswith(ENDINGS)), key=lambda entry: in_order(entry[0]))
    folders = [os.path.basename(os.path.dirname(name)) for name, _, _ in found]
    classes = tuple(sorted(set(folders), key=in_order))
    labels = {name: label for label, name in enumerate(classes)}
    names = zip((name for name, _, _ in found), (labels[folder] for folder in folders), strict=True)
    listing = _listing(path, None if classes == ("",) else classes, names)
    return Packed(**vars(listing), spans=np.array([span for _, *span in found], np.int64))
