"""People to estimate poses of, as arrays: a loader's process that reads one of them touches no page of the others.

# N people, K joints; boxes (x, y, w, h) in pixels of the picture
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tasks.errors import UserError
from tasks.pose.annotations import Annotations
from tasks.pose.coco import hashable, lookup

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Person:
    """One box to estimate a pose in.

    Args:
        picture: file.
        image_id: number of the picture, from 1, in the file's order.
        box: [4], inside the picture for annotated people.
        score: of the detector; 1 for annotated boxes.
        keypoints: [K, 3] x, y, v with v > 0 labelled; zeros for detections.
        size: (w, h) of the picture by the annotation file; (0, 0): whatever it is.
        annotation: place in the file's annotations that count; -1 for detections.
    """

    picture: Path
    image_id: int
    box: Array
    score: float
    keypoints: Array
    size: tuple[int, int] = (0, 0)
    annotation: int = -1


class People(Sequence[Person]):
    """N people.

    Args:
        files: [P], paths of all the pictures, as bytes.
        picture: [N], the place of each person's picture among them.
        boxes: [N, 4].
        scores: [N].
        keypoints: [N, K, 3].
        sizes: [P, 2] of the pictures; 0 where unknown.
        rows: [N], the annotations they come from; -1 for detections.
    """

    def __init__(
        self,
        files: NDArray[np.bytes_],
        picture: NDArray[np.int64],
        boxes: Array,
        scores: Array,
        keypoints: Array,
        sizes: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> None:
        self.files, self.sizes = files, sizes
        self.picture, self.boxes, self.scores, self.keypoints, self.rows = picture, boxes, scores, keypoints, rows

    @classmethod
    def of(cls, persons: Sequence[Person]) -> People:
        """Single people, each in a picture of its own."""
        return cls(
            np.array([os.fsencode(person.picture) for person in persons]),
            np.arange(len(persons)),
            np.stack([person.box for person in persons]),
            np.array([person.score for person in persons]),
            np.stack([person.keypoints for person in persons]),
            np.array([person.size for person in persons]),
            np.array([person.annotation for person in persons]),
        )

    def __len__(self) -> int:
        return len(self.picture)

    @overload
    def __getitem__(self, index: int) -> Person: ...
    @overload
    def __getitem__(self, index: slice) -> People: ...
    def __getitem__(self, index: int | slice) -> Person | People:
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        place = int(self.picture[index])
        width, height = self.sizes[place].tolist()
        return Person(
            self.file(place), place + 1, self.boxes[index], float(self.scores[index]), self.keypoints[index], (width, height),
            int(self.rows[index]),
        )  # fmt: skip

    def file(self, place: int) -> Path:
        """The path of a picture."""
        return Path(os.fsdecode(self.files[place]))

    def chosen(self, index: NDArray[Any]) -> People:
        """Some of them, by place or by a mask."""
        return People(
            self.files, self.picture[index], self.boxes[index], self.scores[index], self.keypoints[index], self.sizes,
            self.rows[index],
        )  # fmt: skip


def annotated(annotations: Annotations) -> People:
    """The people that can be learned from: not crowds, with a box of some area and at least one labelled joint."""
    boxes, useful = annotations.clipped()
    rows = np.flatnonzero(useful)
    return People(
        annotations.files, annotations.picture[rows], boxes[rows], np.ones(len(rows)), annotations.keypoints[rows],
        annotations.sizes, rows,
    )  # fmt: skip


def boxes(
    detections: Any, ids: list[Any], source: Path, categories: tuple[Any, ...] | None = None
) -> tuple[NDArray[np.int64], Array, Array]:
    """The boxes of a COCO detection-results list, picture by picture.

    Args:
        detections: what the file holds.
        ids: of the pictures.
        source: the file, for errors.
        categories: whose boxes count; None: the only one that there is, or 1.

    Returns:
        Places of their pictures [N], boxes [N, 4] and scores [N].

    Raises:
        UserError: not such a list, or no such box in any of the pictures.
    """
    place, rows, over = lookup(ids), [], Counter[str]()
    try:
        if categories is None:
            present = {hashable(d.get("category_id")) for d in detections} - {None}
            categories = tuple(present) if len(present) == 1 else (1,)
        for d in detections:
            picture, category = place(d["image_id"]), hashable(d.get("category_id"))
            if picture is None or (category is not None and category not in categories):
                over["in other pictures" if picture is None else "of other categories"] += 1
                continue
            rows.append((picture, *np.array(d["bbox"], dtype=np.float64).reshape(4).tolist(), float(d["score"])))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wanted = "a list of {image_id, category_id, bbox, score}"
        raise UserError(f"{source}: not a COCO results file, {wanted}: {type(error).__name__} {error}") from error
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    if not np.isfinite(table).all():
        wrong = table[~np.isfinite(table).all(axis=1)][0, 1:].tolist()
        raise UserError(f"{source}: not a COCO results file: NaN or inf in the box {wrong[:4]} of score {wrong[4]}")
    table = table[(table[:, 3:5] > 0).all(axis=1)]
    table = table[np.argsort(table[:, 0], kind="stable")]  # so that a picture is decoded once for all of its boxes
    if not len(table):
        left = "".join(f"; {number} are {kind}" for kind, number in over.items())
        raise UserError(f"{source}: no person's box (category_id {categories[0]}) in any of the {len(ids)} pictures{left}")
    return table[:, 0].astype(np.int64), table[:, 1:5], table[:, 5]


def detected(detections: Any, annotations: Annotations, source: Path, count: int) -> People:
    """The people of a COCO detection-results list, picture by picture.

    Args:
        detections: what the file holds.
        annotations: whose pictures they are, and which categories count.
        source: the file, for errors.
        count: of joints to be found.

    Raises:
        UserError: as `boxes`.
    """
    picture, found, scores = boxes(detections, annotations.ids, source, annotations.categories)
    nobody = np.broadcast_to(np.zeros((1, count, 3)), (len(found), count, 3))
    return People(
        annotations.files, picture, found, scores, nobody, annotations.sizes, np.full(len(found), -1)
    )  # fmt: skip
