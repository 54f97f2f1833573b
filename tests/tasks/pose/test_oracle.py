"""A network that reads colours: right handling of data gives it full marks, exactly.

Each joint is a disc of its own colour, whose left half is darker than its right, so that the network sees a mirror image as
one. Nothing but the pipeline is between the file's joints and the figures: a slip anywhere costs AP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tasks.pose import joint_sets
from tasks.pose.codec import Codec, Heatmap, SimCC, UDPHeatmap
from tasks.pose.joints import COCO, Joints
from tasks.pose.task import PoseTask

FISH = Joints(("tip", "left", "right", "tail"))
HEATMAP = Heatmap((96, 128), (24, 32), sigma=1.5, unbiased=True)
LEVELS = (70, 120, 170, 220, 255)
SIZE, SPACE = 60, 200  # of a person, and between people, so that nobody is in another's crop


def colour(k: int) -> tuple[int, int]:
    """Red and blue of a joint; green is its half's."""
    return LEVELS[k % 5], LEVELS[k // 5]


def disc_half(image: Any, red: int, green: int, blue: int) -> Any:
    """The pixels (x, y) of a colour; specks at others' borders are left out."""
    near = (np.abs(image - (red, green, blue)) < 12).all(axis=2).astype(np.uint8)
    count, places, statistics, _ = cv2.connectedComponentsWithStats(near)
    if count == 1:
        return np.empty((0, 2))
    return np.argwhere(places == 1 + statistics[1:, cv2.CC_STAT_AREA].argmax())[:, ::-1]


class Reader(nn.Module):
    """Finds the discs of a crop, and answers as a trained network does: left and right as they look."""

    def __init__(self, joints: Joints, codec: Codec, task: PoseTask) -> None:
        super().__init__()
        self.joints, self.codec, self.task = joints, codec, task

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.task.mean, self.task.std))
        pixels = (255 * (images * std + mean)).round().numpy().transpose(0, 2, 3, 1)
        return torch.from_numpy(np.stack([self.read(image) for image in pixels]))

    def read(self, image: Any) -> Any:
        points, found, lean = np.zeros((len(self.joints), 2), np.float32), np.zeros(len(self.joints), bool), 0.0
        for k in range(len(self.joints)):
            red, blue = colour(k)
            halves = [disc_half(image, red, green, blue) for green in (60, 200)]
            if all(len(half) for half in halves):
                found[k] = True
                points[k] = np.concatenate(halves).mean(axis=0)
                lean += halves[1][:, 0].mean() - halves[0][:, 0].mean()
        if lean < 0:
            points, found = points[list(self.joints.mirrored)], found[list(self.joints.mirrored)]
        return self.codec.encode(points, found)[0]


def scene(root: Path, joints: Joints, *, text_ids: bool, exif: bool, named: bool, bare: bool) -> None:
    """Pictures of three people, two of them at borders, in COCO's layout; bare: motion photos without their sizes."""
    rng = np.random.default_rng(len(joints))
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "it"}]}
    if named:
        content["categories"][0]["keypoints"] = list(joints.names)
    for number in range(3):
        picture = np.zeros((SIZE + 30, 3 * SPACE, 3), np.uint8)
        height, width = picture.shape[:2]
        name = f"p{number}.jpg"
        image_id = f"id-{number}" if text_ids else 7 * number
        for corner in ((-6, 5), (SPACE + 10, 20), (3 * SPACE - SIZE + 8, 12)):
            cells = rng.permutation(25)[: len(joints)] if len(joints) <= 25 else np.arange(len(joints))
            places = np.stack([cells % 5, cells // 5], axis=1) * SIZE / 5 + rng.uniform(4, 7, (len(joints), 2)) + corner
            triples = []
            for k, (x, y) in enumerate(places.round()):
                inside = 5 <= x < width - 5
                triples += [float(x), float(y), 2] if inside else [0, 0, 0]
                if inside:
                    red, blue = colour(k)
                    for start, green in ((90, 60), (-90, 200)):
                        cv2.ellipse(picture, (int(x), int(y)), (4, 4), 0, start, start + 180, (red, green, blue), -1)
            box = [corner[0], corner[1], SIZE, SIZE]
            content["annotations"].append(
                {"id": len(content["annotations"]), "image_id": image_id, "category_id": 5, "bbox": box, "keypoints": triples}
            )
        sizes = {"width": None} if bare else {"width": width, "height": height}
        content["images"].append({"id": image_id, "file_name": name, **sizes})
        options: dict[str, Any] = {"quality": 100, "subsampling": 0}
        if exif:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6  # turned when shown, annotated as it lies
        Image.fromarray(picture).save(root / "val2017" / name, **options)
        if bare:
            with (root / "val2017" / name).open("ab") as file:
                file.write(b"ftypmp42" * 500)
    (root / "annotations/person_keypoints_val2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("joints", "codec", "options"),
    [
        (FISH, HEATMAP, {}),
        (FISH, HEATMAP, {"text_ids": True, "detected": True}),
        (COCO, HEATMAP, {"named": False}),
        (COCO, HEATMAP, {"exif": True, "text_ids": True}),
        (joint_sets.MPII, HEATMAP, {"detected": True}),
        (joint_sets.HAND, SimCC((96, 128), sigma=3.0), {}),
        (COCO, UDPHeatmap((96, 128), (24, 32), sigma=1.5), {"detected": True}),
        (joint_sets.AP10K, HEATMAP, {"bare": True}),
        (joint_sets.CROWDPOSE, SimCC((96, 128), sigma=3.0), {"text_ids": True, "detected": True}),
    ],
    ids=[
        "fish",
        "fish-detected",
        "coco-unnamed",
        "coco-exif",
        "mpii-detected",
        "hand-simcc",
        "coco-udp",
        "ap10k-bare",
        "crowdpose",
    ],
)
def test_full_marks(joints: Joints, codec: Codec, options: dict[str, bool], tmp_path: Path) -> None:
    """AP is exactly 1. Kills: another set's pairs or sigmas, ids taken for places, boxes of another picture."""
    settings = {"text_ids": False, "exif": False, "named": True, "bare": False, **options}
    detected = settings.pop("detected", False)
    scene(tmp_path, joints, **settings)
    task = PoseTask(root=str(tmp_path), codec=codec, score_threshold=0.0)
    people, annotations = task.people("val")
    if detected:
        ids, shift = annotations.ids, np.array([-2, -1, 5, 3])
        found = [
            {"image_id": ids[p.image_id - 1], "category_id": 5, "bbox": (p.box + shift).tolist(), "score": 0.9} for p in people
        ]
        (tmp_path / "boxes.json").write_text(json.dumps(found[::2] + found[1::2]))
        task = PoseTask(root=str(tmp_path), codec=codec, score_threshold=0.0, detections=str(tmp_path / "boxes.json"))
    data = task.dataset("val")
    assert task.joint_set().names == joints.names
    batches = torch.utils.data.DataLoader(data, batch_size=7)
    figures = task.evaluate(Reader(task.joint_set(), codec, task), batches, tmp_path)
    assert figures["AP"] == 1.0, figures
    assert figures["AR"] == 1.0, figures
    submitted = json.loads((tmp_path / "keypoints.json").read_text())
    assert {pose["image_id"] for pose in submitted} == set(annotations.ids)
    assert {pose["category_id"] for pose in submitted} == {5}
