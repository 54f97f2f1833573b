"""Which pictures a data set has, and of which class: class folders, a CSV file, a folder without classes.

# N pictures, C classes; names as one block of bytes and where each ends, since a million Python strings are a gigabyte
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks import cache, pictures
from tasks.cache import Arrays
from tasks.errors import UserError

_NUMBERS = re.compile(r"(\d+)")
ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """Pictures in files.

    Args:
        root: folder that the names are relative to.
        classes: names of the classes, in the order of their labels; None: the pictures have no labels.
        labels: [N] int32, -1 where there is none.
        block: the bytes of the names, one after the other.
        ends: [N] int64, where in the block each name ends.
    """

    root: Path
    classes: tuple[str, ...] | None
    labels: NDArray[np.int32]
    block: NDArray[np.uint8]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Of a picture, relative to the root."""
        return os.fsdecode(self.block[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())

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


def _gathered(root: Path, classes: list[str] | None, names: Iterable[tuple[str, int]]) -> Arrays:
    """A listing's arrays; classes [C] as bytes.

    Raises:
        UserError: no names.
    """
    labels, block, ends = array("i"), bytearray(), array("q")
    for name, label in names:
        block += os.fsencode(name)
        ends.append(len(block))
        labels.append(label)
    if not labels:
        raise UserError(f"{root}: no pictures in it; looked for {', '.join(ENDINGS)}")
    found = {
        "labels": np.frombuffer(labels, np.int32),
        "block": np.frombuffer(block, np.uint8),
        "ends": np.frombuffer(ends, np.int64),
    }
    return found if classes is None else {**found, "classes": np.array([os.fsencode(name) for name in classes])}


def _listing(root: Path, found: Arrays) -> Listing:
    classes = tuple(os.fsdecode(name) for name in found["classes"].tolist()) if "classes" in found else None
    return Listing(root, classes, found["labels"], found["block"], found["ends"])


def in_order(name: str) -> list[str | int]:
    """The key by which names with numbers in them are sorted: a2 before a10."""
    parts: list[str | int] = list(_NUMBERS.split(name.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts


def of_folder(root: Path) -> Listing:
    """Pictures in one folder per class, however deep; in a folder without such folders, pictures without labels.

    A class folder without a picture in it is no class. The run under way keeps the listing (`tasks.cache`).

    Raises:
        UserError: no pictures.
    """
    return _listing(root, cache.arrays(root, lambda: _in_folders(root)))


def _in_folders(root: Path) -> tuple[Arrays, list[Path]]:
    looked_at = [root]
    classes: list[str] = []

    def labelled() -> Iterator[tuple[str, int]]:
        for folder in sorted((entry.name for entry in os.scandir(root) if entry.is_dir()), key=in_order):
            for name in _files(root, folder, {}, looked_at):
                if classes[-1:] != [folder]:
                    classes.append(folder)
                yield name, len(classes) - 1

    names = labelled()
    first = next(names, None)
    if first is None:
        files = (entry.name for entry in os.scandir(root) if not entry.is_dir())
        return _gathered(root, None, ((name, -1) for name in _pictures(files))), looked_at
    return _gathered(root, classes, itertools.chain([first], names)), looked_at


def _files(root: Path, folder: str, above: dict[tuple[int, int], str], looked_at: list[Path]) -> Iterator[str]:
    """The pictures in a folder and below it. A link to a folder that leads here is not followed again.

    Args:
        root: that names are relative to.
        folder: relative to it.
        above: the folders on the way, by device and number.
        looked_at: takes the folders.
    """
    status = os.stat(root / folder)
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    looked_at.append(root / folder)
    with os.scandir(root / folder) as entries:
        kinds = [(entry.name, entry.is_dir()) for entry in entries]
    yield from (f"{folder}/{name}" for name in _pictures(name for name, is_folder in kinds if not is_folder))
    for below in sorted((name for name, is_folder in kinds if is_folder), key=in_order):
        yield from _files(root, f"{folder}/{below}", {**above, place: folder}, looked_at)


def _pictures(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if name.lower().endswith(ENDINGS)), key=in_order)


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
    classes = sorted({label for _, label in rows}, key=in_order)
    labels = {name: label for label, name in enumerate(classes)}
    return _listing(path.parent, _gathered(path.parent, classes, ((name, labels[label]) for name, label in rows)))


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
    found = cache.arrays(path, lambda: (_in_tar(path), [path]))
    return Packed(**vars(_listing(path, found)), spans=found["spans"])


def _in_tar(path: Path) -> Arrays:
    with tarfile.open(path, "r:") as tar:
        found: list[tuple[str, int, int]] = []
        for entry in tar:
            if entry.isfile() and entry.name.lower().endswith(ENDINGS):
                found.append((entry.name, entry.offset_data, entry.size))
            tar.members.clear()  # type: ignore[attr-defined]  # which would hold an object per file
    found.sort(key=lambda entry: in_order(entry[0]))
    folders = [os.path.basename(os.path.dirname(name)) for name, _, _ in found]
    classes = sorted(set(folders), key=in_order)
    labels = {name: label for label, name in enumerate(classes)}
    names = zip((name for name, _, _ in found), (labels[folder] for folder in folders), strict=True)
    spans = np.array([span for _, *span in found], np.int64).reshape(-1, 2)
    return {**_gathered(path, None if classes == [""] else classes, names), "spans": spans}
