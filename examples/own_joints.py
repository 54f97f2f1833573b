"""A data set with joints of its own: drawn fish, in COCO's layout, with a folder of further pictures and a video.

    python examples/own_joints.py data/fish

What the pipeline needs to know of the joints stands in `categories`: their names, of which "left" and "right" are pairs, and
the limbs that are drawn. docs/pose.md goes on from here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

NAMES = ["tip", "left_fin", "right_fin", "tail"]
COUNTS = {"train": 400, "val": 80}
CATEGORY = {"id": 1, "name": "fish", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3], [1, 4]]}
HEIGHT, WIDTH = 120, 160

Picture = NDArray[np.uint8]
Points = NDArray[np.float64]


def fish(picture: Picture, rng: np.random.Generator, middle: Points, length: float, angle: float) -> Points:
    """Draw one, seen from above, in place; its joints [4, 2]. Which fin is the left one follows from where the tip is."""
    body = np.array([[0.4, 0.0], [0.05, -0.3], [0.05, 0.3], [-0.5, 0.0]]) * length  # ahead, and to the right
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    joints = body @ turn + middle
    colour = rng.uniform(90, 200, 3)
    for joint in joints[1:3]:
        root = middle + np.array([[0.15, 0.0], [-0.1, 0.0]]) * length @ turn
        cv2.fillPoly(picture, [np.stack([*root, joint]).round().astype(np.int32)], (1.25 * colour).tolist(), cv2.LINE_AA)
    axes = (round(0.38 * length), round(0.12 * length))
    cv2.ellipse(picture, middle.round().astype(int).tolist(), axes, np.degrees(angle), 0, 360, colour.tolist(), -1, cv2.LINE_AA)
    fork = np.array([[-0.3, 0.0], [-0.5, -0.12], [-0.5, 0.12]]) * length @ turn + middle
    cv2.fillPoly(picture, [fork.round().astype(np.int32)], (0.8 * colour).tolist(), cv2.LINE_AA)
    cv2.circle(
        picture,
        (joints[0] * 0.8 + middle * 0.2).round().astype(int).tolist(),
        round(length / 38),
        (20, 20, 20),
        -1,
        cv2.LINE_AA,
    )
    return joints


def water(rng: np.random.Generator) -> Picture:
    """A ground of several shades."""
    coarse = rng.normal(0, 18, (6, 8, 3)) + rng.uniform(60, 170, 3)
    return cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


def scene(rng: np.random.Generator) -> tuple[Picture, Points]:
    """A picture with one fish, and its joints."""
    picture = water(rng)
    middle = np.array([WIDTH, HEIGHT]) * rng.uniform(0.4, 0.6, 2)
    return picture, fish(picture, rng, middle, rng.uniform(60, 95), rng.uniform(0, 2 * np.pi))


def bounds(joints: Points) -> tuple[Points, Points]:
    """Corners of the box around a fish."""
    return joints.min(axis=0) - 5, joints.max(axis=0) + 5


def split(root: Path, name: str, count: int, rng: np.random.Generator) -> None:
    """Pictures and the annotation file of one split."""
    folder = root / f"{name}2017"
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [CATEGORY]}
    for number in range(1, count + 1):
        picture, joints = scene(rng)
        file = f"{number:04d}.jpg"
        cv2.imwrite(str(folder / file), picture)
        low, high = bounds(joints)
        content["images"].append({"id": number, "file_name": file, "width": WIDTH, "height": HEIGHT})
        triples = np.column_stack([joints.round(2), np.full(len(joints), 2)]).ravel().tolist()
        content["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [*low, *(high - low)], "keypoints": triples}
        )
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/person_keypoints_{name}2017.json").write_text(json.dumps(content))


def main() -> None:
    """Write everything into a folder that is not there yet."""
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python examples/own_joints.py FOLDER, which must not be there yet")
    root = Path(sys.argv[1])
    for seed, (name, count) in enumerate(COUNTS.items()):
        split(root, name, count, np.random.default_rng(seed))
    rng = np.random.default_rng(9)
    (root / "more").mkdir()
    for number in range(8):  # as predict.py takes pictures for which it is given no boxes: the fish fills them
        picture, joints = scene(rng)
        (left, top), (right, bottom) = (corner.round().astype(int).clip(0) for corner in bounds(joints))
        cv2.imwrite(str(root / f"more/{number}.png"), picture[top:bottom, left:right])
    ground, video = water(rng), cv2.VideoWriter(str(root / "swim.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (WIDTH, HEIGHT))
    for frame in range(20):
        picture, paint = ground.copy(), np.random.default_rng(3)
        fish(picture, paint, np.array([80 + 4 * np.cos(frame / 3), 60 + 4 * np.sin(frame / 3)]), 165, 0.25 * np.cos(frame / 3))
        video.write(picture)
    video.release()


if __name__ == "__main__":
    main()
