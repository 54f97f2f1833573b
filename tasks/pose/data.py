"""Crops of people for training and evaluation.

# K keypoints, h w crop
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
from tasks.pose.people import People
from tasks.pose.transforms import Augmentation

cv2.setNumThreads(0)  # the loader's processes are the parallelism; threads inside each fight for the same cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong with a picture is said in our own words

Picture = NDArray[np.uint8]
_told: set[str] = set()  # what this process has warned of


def readable_people(people: People, max_pixels: int) -> People:
    """Those whose pictures can be read; the other pictures are listed on stderr. Reads every picture."""
    places = np.unique(people.picture)
    files = [people.file(int(place)) for place in places]

    def read(i: int) -> None:
        as_annotated(read_picture(files[i], max_pixels), files[i], tuple(people.sizes[places[i]].tolist()), max_pixels)

    good = pictures.readable([str(file) for file in files], read, os.cpu_count() or 1)
    return people.chosen(np.isin(people.picture, places[np.array(good, dtype=bool)]))


class PoseData(Dataset[dict[str, Tensor]]):
    """Crops of people.

    Items for training, with an augmentation: image [3, h, w] uint8 RGB, target and weight from the codec. Items for
    evaluation: image and index, of the person in `people`.

    Args:
        people: whom to crop.
        codec: encodes the joints; its input size is the crop's.
        augmentation: None for evaluation.
        joints: of the people; mirroring and halving go by them.
        max_pixels: of a picture.
    """

    def __init__(
        self,
        people: People,
        codec: Codec,
        augmentation: Augmentation | None = None,
        joints: Joints = COCO,
        max_pixels: int = pictures.MAX_PIXELS,
    ) -> None:
        self.people = people
        self._mirrored, self._upper = np.array(joints.mirrored), np.array(joints.upper)
        self._codec = codec
        self._augmentation = augmentation
        self.random = augmentation is not None
        self._limit = () if max_pixels == pictures.MAX_PIXELS else (max_pixels,)
        self._last: tuple[int, Picture] | None = None  # what was decoded for the box before

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size, span = self._codec.input_size, self._codec.span
        picture = self._picture(index)
        if self._augmentation is None:
            crop = transforms.crop_box(picture, self.people.boxes[index], size, span)
            return {"image": as_tensor(crop), "index": torch.tensor(index)}
        person = self.people[index]
        centre, extent = transforms.box_to_centre(person.box)
        augmentation, flipped = self._augmentation, np.random.rand() < self._augmentation.flip
        points, labelled = person.keypoints[:, :2], person.keypoints[:, 2] > 0
        if (half := augmentation.half(points, labelled, self._upper)) is not None:
            centre, extent = half
        if flipped:
            # Mirrored as part of the crop's matrix, which gives the same pixels as mirroring the picture first.
            centre = np.array([picture.shape[1] - 1 - centre[0], centre[1]])
        centre, extent, rotation = augmentation.view(centre, extent)
        matrix = transforms.affine(centre, transforms.fit_aspect(extent, size), rotation, span)
        if flipped:
            matrix = matrix @ transforms.mirror(picture.shape[1])
        points = transforms.apply(matrix, points).astype(np.float32)
        if flipped:
            points, labelled = points[self._mirrored], labelled[self._mirrored]
        target, weight = self._codec.encode(points, labelled)
        image = augmentation.recolour(transforms.crop(picture, matrix, size))
        return {"image": as_tensor(image), "target": torch.from_numpy(target), "weight": torch.from_numpy(weight)}

    def _picture(self, index: int) -> Picture:
        """A person's picture, decoded once for neighbours in it."""
        place = int(self.people.picture[index])
        if self._last is None or self._last[0] != place:
            person = self.people[index]
            picture = as_annotated(read_picture(person.picture, *self._limit), person.picture, person.size, *self._limit)
            if not self.random:  # OpenCV warps four channels in half the time of three; here there are many boxes to a picture
                picture = cv2.cvtColor(picture, cv2.COLOR_RGB2RGBA)
            self._last = (place, picture)  # type: ignore[assignment]
        return self._last[1]  # type: ignore[index]


def read_picture(path: Path, max_pixels: int = pictures.MAX_PIXELS, *, turned: bool = True) -> Picture:
    """A picture as RGB [height, width, 3].

    Args:
        path: the file.
        max_pixels: a picture of more is refused.
        turned: as its EXIF header says that it is shown.

    Raises:
        UserError: missing, cut off, of too many pixels, or no picture.
    """
    with pictures.named(path):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: no such picture ({error.strerror})") from error
        pictures.check(content, max_pixels)
        how = cv2.IMREAD_COLOR if turned else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), how)
        if picture is None:
            raise ValueError("OpenCV cannot decode it")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def as_annotated(picture: Picture, path: Path, size: tuple[int, ...], max_pixels: int = pictures.MAX_PIXELS) -> Picture:
    """The picture, of the size that the annotation file says: a photo that EXIF turns may be annotated as it lies.

    Args:
        picture: decoded.
        path: its file.
        size: (w, h) by the annotation file; with a 0, whatever it is.
        max_pixels: as of `read_picture`.

    Raises:
        UserError: it is of another size, so that boxes and joints lie elsewhere.
    """
    height, width = picture.shape[:2]
    if 0 in size or (width, height) == size:
        return picture
    lying = read_picture(path, max_pixels, turned=False)
    if lying.shape[1::-1] != size:
        raise UserError(
            f"{path}: a picture of {width}x{height} pixels, where the annotation file says {size[0]}x{size[1]}; its boxes and "
            "joints would lie elsewhere: put width and height right, or leave them out"
        )
    if "EXIF" not in _told:
        _told.add("EXIF")
        print(
            f"warning: {path}: {size[0]}x{size[1]} by the annotation file, {width}x{height} as its EXIF header turns it; it "
            "and its like are read unturned, as they are annotated",
            file=sys.stderr,
            flush=True,
        )
    return lying


def as_tensor(image: Picture) -> Tensor:
    """A crop [h, w, 3] as [3, h, w]; a fourth channel is left out."""
    return torch.from_numpy(np.ascontiguousarray(image[..., :3].transpose(2, 0, 1)))
