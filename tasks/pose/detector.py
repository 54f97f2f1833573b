"""Where people are in a picture, by one of torchvision's detectors.

# N boxes (x, y, w, h) in pixels of the picture
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models import detection as zoo
from torchvision.models import get_model, list_models

from tasks import checkpoint
from tasks.errors import UserError
from tasks.pose.data import Picture, as_tensor

Array = NDArray[np.float64]
PERSON = 1  # of torchvision's detectors and COCO


def detector(
    name: str, weights: Path, device: torch.device, threshold: float = 0.5
) -> Callable[[Picture], tuple[Array, Array]]:
    """People's boxes of a picture by one of torchvision's detectors.

    Args:
        name: such as "fasterrcnn_resnet50_fpn".
        weights: its state_dict, trained on COCO's classes.
        device: of the detector.
        threshold: of the boxes' scores.

    Returns:
        From a picture to boxes [N, 4] and scores [N].

    Raises:
        UserError: no such detector, or the weights are not its.
    """
    known = list_models(module=zoo)
    if name not in known:
        raise UserError(f"--detector {name}: torchvision has no such detector; it has {', '.join(known)}")
    model = get_model(name, weights=None, weights_backbone=None)
    checkpoint.load_weights(model, weights)
    model.to(device).eval()

    @torch.no_grad()
    def detect(picture: Picture) -> tuple[Array, Array]:
        image = as_tensor(picture).to(device).float() / 255
        found = model([image])[0]
        people = (found["labels"] == PERSON) & (found["scores"] >= threshold)
        corners = found["boxes"][people].cpu().numpy().astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        some = (boxes[:, 2:] > 0).all(axis=1)
        return boxes[some], found["scores"][people].cpu().numpy().astype(np.float64)[some]

    return detect
