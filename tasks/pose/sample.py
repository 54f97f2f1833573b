"""People drawn for trying things out: articulated figures on textured backgrounds, in COCO's own layout.

Each figure has its own pose, proportions, size, place, clothes and view (front or back; the face tells left from right),
among clutter. The set is deterministic and written once, to a cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.pose.joints import COCO

VERSION = 1  # of the drawings: a change of one pixel needs a new number, and makes a new folder
COUNTS = {"train": 800, "val": 120}
_SHIFT = 4  # drawing with sub-pixel coordinates: fractional bits

Picture = NDArray[np.uint8]
Point = NDArray[np.float64]


def written() -> Path:
    """The folder of the sample set, written on the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arsam"
    folder = cache / f"people-v{VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache))
        for seed, (split, count) in enumerate(COUNTS.items()):
            write_split(aside, split, count, np.random.default_rng([VERSION, seed]))
        try:
            aside.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    return folder


def write_split(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Write one split: pictures as JPEG, and the annotations."""
    pictures = root / f"{split}2017"
    pictures.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        picture, keypoints, mask = draw(rng)
        height, width = picture.shape[:2]
        name = f"{number:012d}.jpg"
        content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (pictures / name).write_bytes(content.tobytes())
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        inside = (keypoints >= 0).all(axis=1) & (keypoints[:, 0] < width) & (keypoints[:, 1] < height)
        ys, xs = np.nonzero(mask)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        triples = np.column_stack([np.where(inside[:, None], keypoints, 0).round(2), 2 * inside])
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": box,
                "area": int(mask.astype(bool).sum()),
                "num_keypoints": int(inside.sum()),
                "keypoints": triples.ravel().tolist(),
            }
        )
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(COCO.names), "skeleton": []}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (root / f"annotations/person_keypoints_{split}2017.json").write_text(json.dumps(content))


def draw(rng: np.random.Generator) -> tuple[Picture, NDArray[np.float64], Picture]:
    """One picture with one person.

    Returns:
        The picture [height, width, 3] in BGR, the keypoints [17, 2], and the person's mask [height, width].
    """
    height, width = (int(v) for v in rng.integers(130, 220, 2))
    picture = _background(height, width, rng)
    tall = rng.uniform(0.62, 0.95) * height
    place = np.array([width, height]) * rng.uniform([0.35, 0.38], [0.65, 0.5])
    joints, front = pose(tall, place, rng)
    mask = np.zeros((height, width), np.uint8)
    _person(picture, mask, joints, tall, front, rng)
    noise = rng.normal(0, rng.uniform(2, 8), picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), joints, mask


def pose(tall: float, hips: Point, rng: np.random.Generator) -> tuple[NDArray[np.float64], bool]:
    """Joints [17, 2] of a random pose, and whether the person faces us.

    Args:
        tall: standing height in pixels.
        hips: middle of the hips.
        rng: the generator.
    """
    front = bool(rng.random() < 0.75)
    side = 1.0 if front else -1.0  # a person who faces us has the left hand on the right of the picture
    lean = rng.normal(0, 0.22)
    up, across = _turned(-np.pi / 2 + lean), _turned(lean)
    torso, shoulders, hip = tall * rng.uniform(0.27, 0.32), tall * rng.uniform(0.1, 0.13), tall * rng.uniform(0.06, 0.08)
    neck = hips + up * torso
    head = neck + _turned(-np.pi / 2 + lean + rng.normal(0, 0.15)) * tall * 0.11
    joints = np.zeros((17, 2))
    eye, ear = tall * 0.025, tall * 0.05
    tilt = rng.normal(0, 0.2)
    face = _turned(lean + tilt)
    joints[0] = head + _turned(lean + tilt + np.pi / 2) * eye * 0.6
    for k, sign in ((0, side), (1, -side)):
        joints[1 + k] = head + face * sign * eye - up * -0.4 * eye
        joints[3 + k] = head + face * sign * ear
        joints[5 + k] = neck + across * sign * shoulders
        joints[11 + k] = hips + across * sign * hip
        swing = rng.uniform(-0.4, 2.6)  # of the upper arm, outwards from hanging down
        bend = rng.uniform(-0.3, 2.2)
        arm = np.pi / 2 + lean - sign * swing
        joints[7 + k] = joints[5 + k] + _turned(arm) * tall * 0.17
        joints[9 + k] = joints[7 + k] + _turned(arm - sign * bend) * tall * 0.16
        stride = rng.normal(0.12, 0.35)
        leg = np.pi / 2 + lean * 0.3 - sign * stride
        joints[13 + k] = joints[11 + k] + _turned(leg) * tall * 0.24
        joints[15 + k] = joints[13 + k] + _turned(leg + sign * rng.uniform(-0.2, 0.7)) * tall * 0.23
    return joints, front


def _turned(angle: float) -> Point:
    return np.array([np.cos(angle), np.sin(angle)])


def _background(height: int, width: int, rng: np.random.Generator) -> Picture:
    """Smooth texture at several scales, with rectangles, discs and sticks strewn over it."""
    base = rng.uniform(40, 210, 3) + np.zeros((height, width, 3))
    for cells in (2, 5, 12, 40):
        patch = rng.normal(0, 60 / np.sqrt(cells), (cells, cells, 3)).astype(np.float32)
        base += cv2.resize(patch, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(base, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(4, 14)):
        a, b = (rng.uniform(0, 1, 2) * (width, height) for _ in range(2))
        colour, kind = _colour(rng), rng.integers(3)
        if kind == 0:
            cv2.rectangle(picture, a.astype(int).tolist(), (a + (b - a) * 0.3).astype(int).tolist(), colour, -1)
        elif kind == 1:
            cv2.circle(picture, a.astype(int).tolist(), int(rng.uniform(3, 16)), colour, -1, cv2.LINE_AA)
        else:
            cv2.line(picture, a.astype(int).tolist(), b.astype(int).tolist(), colour, int(rng.integers(1, 8)), cv2.LINE_AA)
    return picture


def _person(picture: Picture, mask: Picture, joints: Point, tall: float, front: bool, rng: np.random.Generator) -> None:
    skin = np.array([120, 160, 215]) * rng.uniform(0.35, 1.1)
    shirt, trousers, hair = rng.uniform(20, 240, 3), rng.uniform(20, 200, 3), rng.uniform(5, 120, 3)
    sleeves, shorts = rng.random() < 0.5, rng.random() < 0.3

    def limb(a: int, b: int, colour: Point, thick: float) -> None:
        shade = colour * rng.uniform(0.85, 1.1)
        for layer, paint in ((picture, np.clip(shade, 0, 255).tolist()), (mask, 255)):
            cv2.line(layer, _fixed(joints[a]), _fixed(joints[b]), paint, max(int(tall * thick), 2), cv2.LINE_AA, _SHIFT)

    def disc(at: Point, radius: float, colour: Point) -> None:
        for layer, paint in ((picture, np.clip(colour, 0, 255).tolist()), (mask, 255)):
            cv2.circle(layer, _fixed(at), max(int(radius * 2**_SHIFT), 16), paint, -1, cv2.LINE_AA, _SHIFT)

    for k in rng.permutation(2):
        limb(11 + k, 13 + k, trousers, 0.08)
        limb(13 + k, 15 + k, skin if shorts else trousers * 0.9, 0.06)
        disc(joints[15 + k], tall * 0.035, hair * 0.5)
    torso = joints[[5, 6, 12, 11]]
    for layer, paint in ((picture, shirt.tolist()), (mask, 255)):
        cv2.fillPoly(layer, [(torso * 2**_SHIFT).astype(np.int32)], paint, cv2.LINE_AA, _SHIFT)
    for a, b in ((5, 6), (5, 11), (6, 12), (11, 12)):
        limb(a, b, shirt, 0.06)
    head = joints[[3, 4]].mean(axis=0)
    neck = joints[[5, 6]].mean(axis=0)
    disc((head + neck) / 2, tall * 0.035, skin)
    disc(head, tall * 0.065, skin if front else hair)
    if front:
        disc(head + (head - neck) * 0.5, tall * 0.035, hair)
        for k in (1, 2):
            disc(joints[k], tall * 0.013, np.full(3, 250.0))
            disc(joints[k], tall * 0.007, np.full(3, 20.0))
        disc(joints[0], tall * 0.012, skin * 0.7)
    for k in (3, 4):
        disc(joints[k], tall * 0.015, skin * 0.85)
    for k in rng.permutation(2):
        limb(5 + k, 7 + k, shirt * 0.92, 0.055)
        limb(7 + k, 9 + k, shirt * 0.92 if sleeves else skin, 0.045)
        disc(joints[9 + k], tall * 0.03, skin)


def _colour(rng: np.random.Generator) -> list[float]:
    return rng.uniform(0, 255, 3).tolist()


def _fixed(point: Point) -> list[int]:
    return (point * 2**_SHIFT).round().astype(int).tolist()
