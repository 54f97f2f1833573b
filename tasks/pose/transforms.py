"""From a person's box to the crop that the network sees, and back: mmpose's top-down geometry.

# centre [2] and extent [2] of a box in pixels of the picture, (x, y) and (w, h); matrices [2, 3] map (x, y, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PADDING = 1.25  # mmpose GetBBoxCenterScale
HALF_BODY_PADDING = 1.5  # mmpose RandomHalfBody, as the counts below
_MIN_TOTAL, _MIN_UPPER, _MIN_LOWER, _PREFER_UPPER = 9, 2, 3, 0.7


def box_to_centre(box: Array, padding: float = PADDING) -> tuple[Array, Array]:
    """Centre and padded extent of a box (x, y, w, h)."""
    return box[:2] + box[2:] / 2, box[2:] * padding


def fit_aspect(extent: Array, size: tuple[int, int]) -> Array:
    """The smallest extent of the crop's aspect ratio that contains this one."""
    ratio = size[0] / size[1]
    width, height = extent
    return np.array([width, width / ratio] if width > height * ratio else [height * ratio, height])


def affine(centre: Array, extent: Array, rotation: float, span: tuple[float, float]) -> Array:
    """The matrix from picture to crop: x' = span / extent R (x - centre) + span / 2.

    Args:
        centre: of the box.
        extent: of the box, in the crop's aspect ratio.
        rotation: of the box in degrees, clockwise on screen; R turns it upright.
        span: pixels of the crop that the extent is brought to: (w, h), or (w - 1, h - 1) under UDP.
    """
    cos, sin = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    linear = (np.array(span) / extent)[:, None] * np.array([[cos, sin], [-sin, cos]])
    return np.column_stack([linear, np.array(span) / 2 - linear @ centre])


def mirror(width: int) -> Array:
    """The [3, 3] matrix that mirrors a picture of this width: x -> width - 1 - x."""
    return np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def apply(matrix: Array, points: Array) -> Array:
    """Map points [..., 2] by a matrix [2, 3]."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def crop(picture: NDArray[np.uint8], matrix: Array, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The crop [h, w, 3], bilinear, black outside of the picture."""
    return cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR)  # type: ignore[return-value]


def crop_box(
    picture: NDArray[np.uint8], box: Array, size: tuple[int, int], span: tuple[float, float]
) -> NDArray[np.uint8]:  # fmt: skip
    """The crop [h, w, 3] of a box as evaluation sees it: padded, upright."""
    centre, extent = box_to_centre(box)
    return crop(picture, affine(centre, fit_aspect(extent, size), 0.0, span), size)


def to_picture(keypoints: Array, centre: Array, extent: Array, span: tuple[float, float]) -> Array:
    """Keypoints [..., 2] of an unrotated crop, in pixels of the picture."""
    return keypoints / np.array(span) * extent + centre - 0.5 * extent


def to_pictures(
    keypoints: Array, boxes: Array, size: tuple[int, int], span: tuple[float, float]
) -> tuple[Array, Array]:  # fmt: skip
    """Keypoints of the crops of boxes in pixels of their pictures, and the areas of the padded boxes.

    Args:
        keypoints: [N, K, 2], of crops as `crop_box` makes them.
        boxes: [N, 4].
        size: (w, h) of the crops.
        span: as of `affine`.

    Returns:
        Keypoints [N, K, 2] and areas [N].
    """
    centres, padded = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:] * PADDING
    widths = np.maximum(padded[:, 0], padded[:, 1] * (size[0] / size[1]))
    extents = np.column_stack([widths, widths / (size[0] / size[1])])
    return to_picture(keypoints, centres[:, None], extents[:, None], span), extents.prod(axis=1)


@dataclass(frozen=True)
class Augmentation:
    """Random view of a person, by numpy's global generator. The defaults are mmpose's for HRNet on COCO.

    Args:
        flip: probability of mirroring.
        half_body: probability of cropping to the upper or the lower half, where 9 joints are labelled.
        shift: of the centre, as a share of the box, at most.
        shift_probability: in [0, 1].
        scale: (least, most) factor of the box.
        rotation: in degrees, at most.
        rotation_probability: in [0, 1].
        photometric: probability of each of: brightness and contrast, hue and saturation, blur (albumentations).
        dropout: probability of one hole of 20 to 40 % of the crop's sides (albumentations).
    """

    flip: float = 0.5
    half_body: float = 0.3
    shift: float = 0.16
    shift_probability: float = 0.3
    scale: tuple[float, float] = (0.5, 1.5)
    rotation: float = 80.0
    rotation_probability: float = 0.6
    photometric: float = 0.0
    dropout: float = 0.0

    def half(self, keypoints: Array, labelled: NDArray[np.bool_], upper: NDArray[np.bool_]) -> tuple[Array, Array] | None:
        """Centre and extent of half a body, or None for the whole one.

        Args:
            keypoints: [K, 2].
            labelled: [K].
            upper: [K], True for the joints of the upper half; without a lower half there are no halves.
        """
        if upper.all() or labelled.sum() < _MIN_TOTAL or np.random.rand() > self.half_body:
            return None
        top, bottom = labelled & upper, labelled & ~upper
        prefer_upper = np.random.rand() < _PREFER_UPPER
        if top.sum() < _MIN_UPPER and bottom.sum() < _MIN_LOWER:
            return None
        if bottom.sum() < _MIN_LOWER:
            chosen = top
        elif top.sum() < _MIN_UPPER:
            chosen = bottom
        else:
            chosen = top if prefer_upper else bottom
        points = keypoints[chosen]
        extent = (points.max(axis=0) - points.min(axis=0)) * HALF_BODY_PADDING
        return points.mean(axis=0), np.maximum(extent, 1.0)

    def view(self, centre: Array, extent: Array) -> tuple[Array, Array, float]:
        """Shifted centre, scaled extent and rotation in degrees."""
        draws = _truncated_normal(4)
        if np.random.rand() < self.shift_probability:
            centre = centre + draws[:2] * self.shift * extent
        least, most = self.scale
        factor = (least + most) / 2 + draws[2] * (most - least) / 2
        rotation = draws[3] * self.rotation if np.random.rand() < self.rotation_probability else 0.0
        return centre, extent * factor, float(rotation)

    def recolour(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The photometric and dropout augmentations of a crop [h, w, 3]."""
        if not (self.photometric or self.dropout):
            return picture
        pipeline = _pipeline(self.photometric, self.dropout)
        pipeline.set_random_seed(int(np.random.randint(2**31)))
        return pipeline(image=picture)["image"]


def _truncated_normal(count: int) -> Array:
    """Standard normal draws inside [-1, 1]."""
    draws = np.random.randn(count)
    while (outside := np.abs(draws) > 1).any():
        draws[outside] = np.random.randn(int(outside.sum()))
    return draws


@lru_cache
def _pipeline(photometric: float, dropout: float) -> Any:
    import os

    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks a server for its newest version otherwise
    import albumentations

    return albumentations.Compose(
        [
            albumentations.RandomBrightnessContrast(p=photometric),
            albumentations.HueSaturationValue(p=photometric),
            albumentations.Blur(blur_limit=3, p=photometric),
            albumentations.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(0.2, 0.4), hole_width_range=(0.2, 0.4), p=dropout
            ),
        ]
    )
