"""Poses in pictures and frames of videos: each is decoded once, and crops of many go through the network together.

# N boxes (x, y, w, h) of a frame, K keypoints
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.pose import transforms
from tasks.pose.data import Picture, as_tensor
from tasks.pose.people import People
from tasks.pose.task import PoseTask

Array = NDArray[np.float64]
Poses = list[dict[str, Any]]

_BATCH = 32  # crops at a time
_PIXELS = 60_000_000  # that wait for their batch to be full


@dataclass(frozen=True)
class Frame:
    """A picture, or a frame of a video, and the boxes to estimate poses in.

    Args:
        number: image_id of its results.
        picture: RGB [height, width, 3].
        boxes: [N, 4].
        scores: [N], of a detector; 1 for what is no detection.
    """

    number: int
    picture: Picture
    boxes: Array
    scores: Array


def whole(number: int, picture: Picture) -> Frame:
    """One person who fills the picture."""
    height, width = picture.shape[:2]
    return Frame(number, picture, np.array([[0.0, 0.0, width - 1, height - 1]]), np.ones(1))


def poses(
    task: PoseTask, networks: list[nn.Module], frames: Iterable[Frame], device: torch.device
) -> Iterator[tuple[Frame, list[Poses]]]:
    """Each frame with its poses by each network, as COCO results, in the frames' order.

    Args:
        task: of the networks.
        networks: in evaluation mode, on the device.
        frames: read as they are needed.
        device: of the networks.
    """
    waiting: list[Frame] = []
    crops, pixels = 0, 0
    for frame in frames:
        waiting.append(frame)
        crops, pixels = crops + len(frame.boxes), pixels + frame.picture.shape[0] * frame.picture.shape[1]
        if crops >= _BATCH or pixels >= _PIXELS:
            yield from _answered(task, networks, waiting, device)
            waiting, crops, pixels = [], 0, 0
    yield from _answered(task, networks, waiting, device)


@torch.no_grad()
def _answered(
    task: PoseTask, networks: list[nn.Module], frames: list[Frame], device: torch.device
) -> Iterator[tuple[Frame, list[Poses]]]:
    size, span = task.codec.input_size, task.codec.span
    crops = [as_tensor(transforms.crop_box(frame.picture, box, size, span)) for frame in frames for box in frame.boxes]
    place = np.array([i for i, frame in enumerate(frames) for _ in frame.boxes], dtype=np.int64)
    found: list[list[Poses]] = [[[] for _ in networks] for _ in frames]
    if crops:
        boxes, scores = (np.concatenate([getattr(frame, name) for frame in frames]) for name in ("boxes", "scores"))
        nobody = np.zeros((len(crops), 1, 3))
        nowhere, unknown = np.full(len(frames), b""), np.zeros((len(frames), 2), dtype=np.int64)
        people = People(nowhere, place, boxes, scores, nobody, unknown, np.full(len(crops), -1))
        for k, network in enumerate(networks):
            for pose in task.results(network, _batches(crops, device), people):
                i = pose["image_id"] - 1
                found[i][k].append({**pose, "image_id": frames[i].number})
    yield from zip(frames, found, strict=True)


def _batches(crops: list[Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(crops), _BATCH):
        part = crops[start : start + _BATCH]
        yield {"image": torch.stack(part).to(device), "index": torch.arange(start, start + len(part))}
