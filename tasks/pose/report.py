"""What an evaluation leaves in its folder: the poses as COCO results, pictures of some of them, and the errors.

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
    out: Path,
    annotations: Annotations,
    truth: dict[str, Any],
    found: list[dict[str, Any]],
    joints: Joints,
    *,
    max_pixels: int,
    threshold: float,
) -> None:
    """Write keypoints.json and, where there are annotations, errors.json, errors.png and predictions.png.

    Args:
        out: the folder.
        annotations: of the pictures.
        truth: they, as evaluators read them.
        found: keypoint results, of pictures that are numbered from 1.
        joints: their set.
        max_pixels: of a picture.
        threshold: joints of a lower score are not drawn.
    """
    with folder.tolerated(out):
        log.write_json(out / "keypoints.json", as_submitted(annotations, found), indent=None)
    matches = errors.matched(truth, found, joints)
    if not matches.people:
        return
    sheet = examples(annotations, matches, joints, max_pixels=max_pixels, threshold=threshold)
    summary = errors.error_report(truth, found, joints, matches)
    with folder.tolerated(out):
        log.write_json(out / "errors.json", summary)
        draw.error_picture(out / "errors.png", summary, joints)
        draw.write(out / "predictions.png", sheet)


def as_submitted(annotations: Annotations, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results under the file's own ids of pictures and category, as evaluation servers take them."""
    category = annotations.categories[0]
    return [{**pose, "image_id": annotations.ids[pose["image_id"] - 1], "category_id": category} for pose in found]


def examples(
    annotations: Annotations,
    matches: errors.Matches,
    joints: Joints,
    *,
    max_pixels: int,
    threshold: float = 0.0,
    count: int = 6,
) -> draw.Picture:
    """A contact sheet of people whose poses are typical, best and worst, by OKS, with the annotation in white."""
    people, _, likeness = matches
    order = np.argsort(likeness, kind="stable")
    whole = [i for i in order if people[i]["num_keypoints"] >= min(_WHOLE, len(joints))] or list(order)
    each, middle = max(1, min(count, len(whole) // 3)), len(whole) // 2
    first = max(0, middle - each // 2)
    chosen = {
        f"typical: around the median OKS, {np.median(likeness):.2f}, of {len(people)} people": whole[first : first + each],
        "best": whole[::-1][:each],
        "worst": whole[:each],
    }

    def drawn(i: int) -> draw.Picture:
        return _tile(annotations, matches, i, joints, max_pixels, threshold)

    rows = [(title, [(f"OKS {likeness[i]:.2f}", drawn(i)) for i in some]) for title, some in chosen.items()]
    sheet = draw.contact_sheet(rows)
    meanings = [*draw.sides(joints), (draw.WHITE, "annotated")]
    meanings += [(draw.DARK, f"joints of a score below {threshold:g} are not drawn")] if threshold > 0 else []
    return np.concatenate([draw.legend(sheet.shape[1], meanings), sheet])


def _tile(
    annotations: Annotations, matches: errors.Matches, i: int, joints: Joints, max_pixels: int, threshold: float
) -> draw.Picture:  # fmt: skip
    """One person with the labelled joints, as they are annotated and as they were found."""
    person, pose = matches.people[i], matches.poses[i]
    place = person["image_id"] - 1
    file, size = annotations.file(place), tuple(annotations.sizes[place].tolist())
    picture = as_annotated(read_picture(file, max_pixels), file, size, max_pixels)
    truth = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
    centre, extent = transforms.box_to_centre(np.array(person["bbox"], dtype=np.float64))
    matrix = transforms.affine(centre, transforms.fit_aspect(extent, _TILE), 0.0, _TILE)
    tile, places = transforms.crop(picture, matrix, _TILE), transforms.apply(matrix, truth[:, :2])
    seen = np.where(truth[:, 2] > 0, 1.0, -1.0)
    for thick, colour in ((2.6, draw.DARK), (1.0, draw.WHITE)):  # white alone is lost on a bright ground
        tile = draw.skeleton(tile, places, seen, joints, thick=thick, colour=colour)
    sure = (truth[:, 2] > 0) & (pose[:, 2] >= threshold)
    scores = np.where(sure, np.maximum(pose[:, 2], 0.5), -1.0)  # unsure, yet to be seen
    return draw.skeleton(tile, transforms.apply(matrix, pose[:, :2]), scores, joints, thick=2.5)
