"""COCO keypoint files, read once into arrays: whose pictures, boxes and joints they hold, and which joints those are.

# P pictures, M annotations, K joints; boxes (x, y, w, h) in pixels of the picture
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import distributed
from tasks.errors import UserError
from tasks.pose import coco, joint_sets
from tasks.pose.evaluate import AREA
from tasks.pose.joints import COCO, Joints

Array = NDArray[np.float64]

# COCO-WholeBody keeps the other joints of its 133 in fields of their own.
_WHOLE_BODY = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")


@dataclass(frozen=True)
class Annotations:
    """A file's annotations of the categories that count, crowds and unlabelled people among them.

    Args:
        source: the file.
        ids: of the P pictures, as the file has them.
        files: [P], the pictures' paths as bytes.
        sizes: [P, 2], width and height.
        picture: [M], the place of an annotation's picture.
        boxes: [M, 4].
        areas: [M].
        crowds: [M].
        keypoints: [M, K, 3], x, y, v with v > 0 labelled.
        categories: ids that a detector's boxes may have; the first is what results are given.
        complete: has the file annotations at all, or pictures alone?
    """

    source: Path
    ids: list[Any]
    files: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    picture: NDArray[np.int64]
    boxes: Array
    areas: Array
    crowds: NDArray[np.bool_]
    keypoints: Array
    categories: tuple[Any, ...]
    complete: bool

    def file(self, place: int) -> Path:
        """The path of a picture."""
        return Path(os.fsdecode(self.files[place]))

    def clipped(self) -> tuple[Array, NDArray[np.bool_]]:
        """The boxes inside their pictures, [M, 4], and who can be learned from, [M].

        Those are no crowd, have a box of some area, and a labelled joint.
        """
        sizes = self.sizes[self.picture].astype(np.float64)
        limit = np.where(sizes > 0, sizes - 1, np.inf)  # unknown where the picture cannot be read
        low = np.clip(self.boxes[:, :2], 0, limit)
        high = np.clip(self.boxes[:, :2] + self.boxes[:, 2:], 0, limit)
        useful = ~self.crowds & (high > low).all(axis=1) & (self.keypoints[..., 2] > 0).any(axis=1)
        return np.concatenate([low, high - low], axis=1), useful

    def kept(self, rows: NDArray[Any]) -> Annotations:
        """These annotations alone, of the same pictures."""
        names = ("picture", "boxes", "areas", "crowds", "keypoints")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def truth(self) -> dict[str, Any]:
        """As COCO's evaluators read it: pictures are numbered from 1, in the file's order."""
        labelled = (self.keypoints[..., 2] > 0).sum(axis=1).tolist()
        columns = (
            self.picture + 1,
            self.boxes,
            self.areas,
            self.crowds.astype(int),
            self.keypoints.reshape(len(self.boxes), 3 * self.keypoints.shape[1]),
        )
        names = ("image_id", "bbox", "area", "iscrowd", "keypoints")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        annotations = [
            {"id": number, "category_id": 1, "num_keypoints": count, **dict(zip(names, row, strict=True))}
            for number, (count, row) in enumerate(zip(labelled, rows, strict=True), start=1)
        ]
        images = [{"id": number} for number in range(1, len(self.ids) + 1)]
        return {"images": images, "annotations": annotations, "categories": [{"id": 1}]}


def read(path: Path, folder: Path, how: str, joints: Joints | None, category: Any, lenient: bool) -> Annotations:
    """A COCO keypoint file.

    Args:
        path: the file.
        folder: of its pictures.
        how: where to get the data, for errors.
        joints: that it must hold; None: those that `categories` names.
        category: name or id of the one that counts; None: those with keypoints.
        lenient: pictures whose size the file lacks need not be readable.

    Raises:
        UserError: missing, broken, or an annotation with another number of keypoints, of an unknown picture, with a box of
            NaN or of negative size.
    """
    return _read(path, folder, coco.stamp(path), how, joints, category, lenient)


def named(path: Path, how: str, category: Any) -> Joints | None:
    """The joints that a file's categories name.

    Raises:
        UserError: as `read`.
    """
    return _categories(path, coco.stamp(path), how, category).joints


@lru_cache(maxsize=4)
def _categories(path: Path, stamp: tuple[int, int], how: str, category: Any) -> coco.Categories:
    return coco.categories(coco.content(path, stamp, how), category, path)


@lru_cache(maxsize=4)
def _read(
    path: Path, folder: Path, stamp: tuple[int, int], how: str, joints: Joints | None, category: Any, lenient: bool
) -> Annotations:
    content = coco.content(path, stamp, how)
    chosen = _categories(path, stamp, how, category)
    if joints is None:
        joints = chosen.joints or COCO
    elif chosen.joints is not None and not joint_sets.agree(joints, chosen.joints):
        raise UserError(f"{path}: its keypoints are {difference(chosen.joints, joints)}; task.joints=None takes the file's")
    found = _parsed(content, folder, path, joints, chosen, lenient)
    coco.forget(path)
    return found


def _parsed(
    content: dict[str, Any], folder: Path, source: Path, joints: Joints, chosen: coco.Categories, lenient: bool
) -> Annotations:
    ids, files, sizes = coco.images(content["images"], folder, source, lenient)
    over = Counter[str]()
    listed = content.get("annotations") or []

    def where(number: int) -> str:
        annotation = listed[number]
        return f"{source}: annotation {annotation.get('id') if isinstance(annotation, dict) else f'number {number + 1}'}"

    rows: list[tuple[int, int, list[Any], list[Any], Any, Any]] = []
    row_of = _reader(joints, chosen, coco.lookup(ids), over)
    for number, annotation in enumerate(listed):
        try:
            row = row_of(annotation)
            if row is not None:
                rows.append((number, *row))
        except UserError as error:
            raise UserError(f"{where(number)} {error}") from error
        except coco.BAD as error:
            raise UserError(f"{where(number)} is not one of COCO's ({type(error).__name__}: {error})") from error
    if over and distributed.rank() == 0:
        kinds = ", ".join(f"{count} {kind}" for kind, count in over.items())
        print(f"warning: {source}: {over.total()} annotations are passed over: {kinds}", file=sys.stderr, flush=True)
    numbers, places, boxes, keypoints, areas, crowds = zip(*rows, strict=True) if rows else ((),) * 6

    def named(row: int) -> str:
        return where(numbers[row])

    boxes = _numbers(boxes, (4,), named)
    joints_of = _numbers(keypoints, (len(joints), 3), named)
    given = _numbers(areas, (), named, optional=True)
    areas = np.where(np.isnan(given), AREA * boxes[:, 2] * boxes[:, 3], given)
    for i in np.flatnonzero((boxes[:, 2:] < 0).any(axis=1) | (areas < 0)):
        raise UserError(f"{named(int(i))} has a negative size, bbox {boxes[i].tolist()}, area {areas[i]}; bbox is (x, y, w, h)")
    return Annotations(
        source, ids, files, sizes, np.array(places, dtype=np.int64), boxes, areas, np.array(crowds, dtype=bool), joints_of,
        chosen.boxes, complete="annotations" in content,
    )  # fmt: skip


def _reader(
    joints: Joints, chosen: coco.Categories, place: Callable[[Any], int | None], over: Counter[str]
) -> Callable[[dict[str, Any]], tuple[int, list[Any], list[Any], Any, bool] | None]:
    """From an annotation to picture, box, keypoints, area and crowd; to None for one that is passed over, which is counted."""
    count, parts = 3 * len(joints), len(joints) == len(joint_sets.WHOLE_BODY)

    def read(annotation: dict[str, Any]) -> tuple[int, list[Any], list[Any], Any, bool] | None:
        category = coco.hashable(annotation.get("category_id"))
        if chosen.ids and category is not None and category not in chosen.ids:
            over[f"of the category {chosen.names.get(category, category)}"] += 1
            return None
        for field, what in (("keypoints", "without keypoints"), ("bbox", "without a box")):
            if not annotation.get(field):
                over[what] += 1
                return None
        values: Any = annotation["keypoints"]
        if parts and len(values) == 3 * len(COCO):
            values = [value for name in _WHOLE_BODY for value in annotation[name]]
        if len(values) != count:
            raise UserError(
                f"has {len(values)} keypoint values, expected {count}: x, y, v of {joints.listed()}; name other joints in "
                "categories[].keypoints"
            )
        if isinstance(values, list) and None in values:  # a joint without coordinates is not labelled
            triples = [values[i : i + 3] for i in range(0, len(values), 3)]
            values = [value for triple in triples for value in (triple if None not in triple else (0, 0, 0))]
        picture = place(annotation["image_id"])
        if picture is None:
            raise UserError(f"names the picture {annotation['image_id']}, which the file does not list")
        crowd = annotation.get("iscrowd")
        if crowd is not None and not isinstance(crowd, (int, float)):
            raise UserError(f"has iscrowd {crowd!r}, expected a whole number")
        return picture, annotation["bbox"], values, annotation.get("area"), bool(crowd)

    return read


def _numbers(rows: Iterable[Any], shape: tuple[int, ...], named: Callable[[int], str], optional: bool = False) -> Array:
    """Rows of numbers as an array; the first row that is none is named."""
    rows = list(rows)
    try:
        found = np.array(rows, dtype=np.float64).reshape(len(rows), *shape)
    except (*coco.BAD, RecursionError):
        for i, row in enumerate(rows):
            try:
                np.array(row, dtype=np.float64).reshape(shape)
            except (*coco.BAD, RecursionError) as error:
                raise UserError(f"{named(i)} is not one of COCO's ({type(error).__name__}: {error})") from error
        raise
    wrong = np.isinf(found) if optional else ~np.isfinite(found)
    for i in np.flatnonzero(wrong.any(axis=tuple(range(1, wrong.ndim)))):
        raise UserError(f"{named(int(i))} has NaN or inf in its bbox, keypoints or area")
    return found


def difference(found: Joints, expected: Joints) -> str:
    """How two joint sets differ, in words."""
    pairs = enumerate(zip(found.names, expected.names, strict=False), start=1)
    first = next((f", the {number}. of them {one!r} and not {other!r}" for number, (one, other) in pairs if one != other), "")
    return f"{found.listed()}, where {expected.listed()} are expected{first}"
