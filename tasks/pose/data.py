"""People of a COCO keypoint set, cropped one by one.

# K keypoints, h w crop; boxes (x, y, w, h) in pixels of the picture
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tasks import pictures
from tasks.errors import UserError
from tasks.pose import transforms
from tasks.pose.codec import Codec
from tasks.pose.joints import COCO, Joints
from tasks.pose.transforms import Augmentation

cv2.setNumThreads(0)  # the loader's processes are the parallelism; threads inside each fight for the same cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong with a picture is said in our own words


@dataclass(frozen=True)
class Person:
    """One box to estimate a pose in.

    Args:
        picture: file.
        image_id: COCO id of the picture.
        box: [4], inside the picture for annotated people.
        score: of the detector; 1 for annotated boxes.
        keypoints: [K, 3] x, y, v with v > 0 labelled; zeros for detections.
        annotation: place in the file's list of annotations; None for detections.
    """

    picture: Path
    image_id: int
    box: NDArray[np.float64]
    score: float
    keypoints: NDArray[np.float64]
    annotation: int | None = None


def read_json(path: Path, how: str) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        how: where to get it, for the error.

    Raises:
        UserError: missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {how}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def listed_pictures(images: Any, folder: Path, source: Path) -> dict[Any, Path]:
    """The files of a COCO file's images, by id.

    Raises:
        UserError: an image without id or file_name, or whose file lies elsewhere.
    """
    try:
        return {image["id"]: pictures.inside(folder, image["file_name"], source) for image in images}
    except (KeyError, TypeError) as error:
        wanted = "each of its images needs an id and a file_name"
        raise UserError(f"{source}: not a COCO annotation file, {wanted}: {type(error).__name__} {error}") from error


def annotated_people(annotations: dict[str, Any], folder: Path, source: Path, joints: Joints = COCO) -> list[Person]:
    """The people that can be learned from: not crowds, with a box of some area and at least one labelled joint.

    Args:
        annotations: a COCO keypoint file's content.
        folder: of the pictures.
        source: the file, for errors.
        joints: that each annotation holds.

    Raises:
        UserError: an annotation without keypoints, with another number of them, with a box of NaN or of negative size, or of
            an unknown picture.
    """
    files = listed_pictures(annotations["images"], folder, source)
    images = {image["id"]: image for image in annotations["images"]}
    if not isinstance(annotations["annotations"], list):
        raise UserError(f"{source}: not a COCO annotation file: its annotations are no list")
    people = []
    for place, annotation in enumerate(annotations["annotations"]):
        where = f"{source}: annotation {annotation.get('id') if isinstance(annotation, dict) else f'number {place + 1}'}"
        try:
            person = _annotated(annotation, place, files, images, where, len(joints))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where} is not one of COCO's ({type(error).__name__}: {error})") from error
        if person is not None:
            people.append(person)
    return people


def _annotated(
    annotation: dict[str, Any], place: int, files: dict[Any, Path], images: dict[Any, dict[str, Any]], where: str, count: int
) -> Person | None:
    """An annotation as a person, or None for one that cannot be learned from."""
    if "keypoints" not in annotation or "bbox" not in annotation:
        raise UserError(f"{where} has no keypoints or no bbox; use a person_keypoints file of COCO")
    if len(annotation["keypoints"]) != 3 * count:
        raise UserError(f"{where} has {len(annotation['keypoints'])} keypoint values, expected {3 * count}")
    if annotation["image_id"] not in files:
        raise UserError(f"{where} names the picture {annotation['image_id']}, which the file does not list")
    image = images[annotation["image_id"]]
    x, y, width, height = bbox = np.array(annotation["bbox"], dtype=np.float64)
    keypoints = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
    area = float(annotation.get("area", 0))
    if not (np.isfinite(bbox).all() and np.isfinite(keypoints).all() and np.isfinite(area)):
        raise UserError(f"{where} has NaN or inf in its bbox, keypoints or area")
    if min(width, height, area) < 0:
        raise UserError(f"{where} has a negative size, bbox {annotation['bbox']}, area {area}; bbox is (x, y, width, height)")
    for name in ("iscrowd", "num_keypoints"):  # the evaluators count on numbers
        if not isinstance(annotation.get(name, 0), int):
            raise UserError(f"{where} has {name} {annotation[name]!r}, expected a whole number")
    limit = np.array([image["width"] - 1, image["height"] - 1])
    low, high = np.clip([x, y], 0, limit), np.clip([x + width, y + height], 0, limit)
    if annotation.get("iscrowd") or not (high > low).all() or not (keypoints[:, 2] > 0).any():
        return None
    return Person(files[image["id"]], image["id"], np.concatenate([low, high - low]), 1.0, keypoints, place)


def readable_people(people: list[Person]) -> list[Person]:
    """Those whose pictures can be read; the other pictures are listed on stderr. Reads every picture."""
    files = list(dict.fromkeys(person.picture for person in people))
    good = pictures.readable([str(file) for file in files], lambda i: read_picture(files[i]), os.cpu_count() or 1)
    left = {file for file, fine in zip(files, good, strict=True) if fine}
    return [person for person in people if person.picture in left]


def detected_people(detections: Any, files: dict[Any, Path], source: Path, joints: Joints = COCO) -> list[Person]:
    """The people of a COCO detection-results list: person boxes in the pictures that are listed.

    Args:
        detections: what the file holds.
        files: the pictures by id.
        source: the file, for errors.
        joints: to be found.

    Raises:
        UserError: not such a list, or no person box in any of the pictures.
    """
    nothing = np.zeros((len(joints), 3))
    people = []
    try:
        for d in detections:
            if d["image_id"] in files and d.get("category_id", 1) == 1:
                box = np.array(d["bbox"], dtype=np.float64).reshape(4)
                if not np.isfinite([*box, float(d["score"])]).all():
                    raise ValueError(f"NaN or inf in {d}")
                if min(box[2:]) <= 0:
                    continue
                people.append(Person(files[d["image_id"]], d["image_id"], box, float(d["score"]), nothing))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wanted = "a list of {image_id, category_id, bbox, score}"
        raise UserError(f"{source}: not a COCO results file, {wanted}: {type(error).__name__} {error}") from error
    if not people:
        raise UserError(f"{source}: no person's box (category_id 1) in any of the {len(files)} pictures")
    return people


class PoseData(Dataset[dict[str, Tensor]]):
    """Crops of people.

    Items for training, with an augmentation: image [3, h, w] uint8 RGB, target and weight from the codec. Items for
    evaluation: image and index, of the person in `people`.

    Args:
        people: whom to crop.
        codec: encodes the joints; its input size is the crop's.
        augmentation: None for evaluation.
        joints: of the people; mirroring and halving go by them.
    """

    def __init__(
        self, people: list[Person], codec: Codec, augmentation: Augmentation | None = None, joints: Joints = COCO
    ) -> None:
        self.people = people
        self._mirrored, self._upper = np.array(joints.mirrored), np.array(joints.upper)
        self._codec = codec
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        person, size = self.people[index], self._codec.input_size
        picture = read_picture(person.picture)
        centre, extent = transforms.box_to_centre(person.box)
        if self._augmentation is None:
            matrix = transforms.affine(centre, transforms.fit_aspect(extent, size), 0.0, size)
            return {"image": _tensor(transforms.crop(picture, matrix, size)), "index": torch.tensor(index)}
        augmentation, flipped = self._augmentation, np.random.rand() < self._augmentation.flip
        points, labelled = person.keypoints[:, :2], person.keypoints[:, 2] > 0
        if (half := augmentation.half(points, labelled, self._upper)) is not None:
            centre, extent = half
        if flipped:
            # Mirrored as part of the crop's matrix, which gives the same pixels as mirroring the picture first.
            centre = np.array([picture.shape[1] - 1 - centre[0], centre[1]])
        centre, extent, rotation = augmentation.view(centre, extent)
        matrix = transforms.affine(centre, transforms.fit_aspect(extent, size), rotation, size)
        if flipped:
            matrix = matrix @ transforms.mirror(picture.shape[1])
        points = transforms.apply(matrix, points).astype(np.float32)
        if flipped:
            points, labelled = points[self._mirrored], labelled[self._mirrored]
        target, weight = self._codec.encode(points, labelled)
        image = augmentation.recolour(transforms.crop(picture, matrix, size))
        return {"image": _tensor(image), "target": torch.from_numpy(target), "weight": torch.from_numpy(weight)}


def read_picture(path: Path) -> NDArray[np.uint8]:
    """A picture as RGB [height, width, 3].

    Raises:
        UserError: missing, cut off, of too many pixels, or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: no such picture ({error.strerror})") from error
    with pictures.named(path):
        pictures.check(content)
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError("OpenCV cannot decode it")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
