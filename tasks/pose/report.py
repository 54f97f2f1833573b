"""What an evaluation leaves in its folder: the poses as COCO results, pictures of the worst and the best, and the errors.

# N people, K keypoints
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tasks import folder, log
from tasks.pose import draw, errors, transforms
from tasks.pose.annotations import Annotations
from tasks.pose.data import as_annotated, read_picture
from tasks.pose.joints import Joints

_TILE = (192, 256)  # of a contact sheet
_WHOLE = 6  # labelled joints of a person who may stand on it, if there is one


def write(
    out: Path, annotations: Annotations, truth: dict[str, Any], found: list[dict[str, Any]], joints: Joints, max_pixels: int
) -> None:
    """Write keypoints.json and, where there are annotations, errors.json, errors.png and predictions.png.

    Args:
        out: the folder.
        annotations: of the pictures.
        truth: they, as evaluators read them.
        found: keypoint results, of pictures that are numbered from 1.
        joints: their set.
        max_pixels: of a picture.
    """
    with folder.tolerated(out):
        log.write_json(out / "keypoints.json", as_submitted(annotations, found))
    matches = errors.matched(truth, found, joints)
    if not matches.people:
        return
    sheet = worst_and_best(annotations, matches, joints, max_pixels)
    summary = errors.error_report(truth, found, joints, matches)
    with folder.tolerated(out):
        log.write_json(out / "errors.json", summary)
        draw.error_picture(out / "errors.png", summary, joints)
        draw.write(out / "predictions.png", sheet)


def as_submitted(annotations: Annotations, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results under the file's own ids of pictures and category, as evaluation servers take them."""
    category = annotations.categories[0]
    return [{**pose, "image_id": annotations.ids[pose["image_id"] - 1], "category_id": category} for pose in found]


def worst_and_best(
    annotations: Annotations, matches: errors.Matches, joints: Joints, max_pixels: int, count: int = 8
) -> draw.Picture:
    """A contact sheet of the people whose poses are least and most like the annotated ones, which are drawn in white."""
    people, poses, likeness = matches
    order = np.argsort(likeness)
    whole = [i for i in order if people[i]["num_keypoints"] >= min(_WHOLE, len(joints))] or list(order)
    rows = []
    for title, chosen in (("worst", whole[:count]), ("best", whole[::-1][:count])):
        tiles = []
        for i in chosen:
            place = people[i]["image_id"] - 1
            file, size = annotations.file(place), tuple(annotations.sizes[place].tolist())
            picture = as_annotated(read_picture(file, max_pixels), file, size, max_pixels)
            truth = np.array(people[i]["keypoints"], dtype=np.float64).reshape(-1, 3)
            centre, extent = transforms.box_to_centre(np.array(people[i]["bbox"], dtype=np.float64))
            matrix = transforms.affine(centre, transforms.fit_aspect(extent, _TILE), 0.0, _TILE)
            tile = transforms.crop(picture, matrix, _TILE)
            seen = np.where(truth[:, 2] > 0, 1.0, -1.0)
            tile = draw.skeleton(tile, transforms.apply(matrix, truth[:, :2]), seen, joints, thick=1.0, colour=draw.WHITE)
            scores = np.where(truth[:, 2] > 0, np.maximum(poses[i, :, 2], 0.5), -1.0)  # unsure, yet to be seen
            tile = draw.skeleton(tile, transforms.apply(matrix, poses[i, :, :2]), scores, joints, thick=2.5)
            tiles.append((f"OKS {likeness[i]:.2f}", tile))
        rows.append((f"{title} of {len(people)}; white: annotated", tiles))
    return draw.contact_sheet(rows)
