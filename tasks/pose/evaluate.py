"""COCO keypoint evaluation: the ten figures, and AP by size.

# K keypoints; coordinates in pixels of the picture, areas in square pixels
"""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from typing import Any

import numpy as np

from tasks.pose.joints import COCO, Joints

AREA = 0.53  # of the box, where a file gives none, as in mmpose
SIZES = (0, 64, 96, 128, 192, 256, 100_000)  # edges of the classes of sqrt(area) in pixels; COCO's M ends and L begins at 96
FIGURES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


def ground_truth(annotations: dict[str, Any]) -> dict[str, Any]:
    """Ground truth as every evaluator reads it alike.

    An annotation id of 0 counts as unmatched in pycocotools, so ids start at 1 here; a missing num_keypoints, area or
    iscrowd is filled in. Everybody is a person, whatever the file calls them: so are the results.
    """
    images = [{"id": image["id"]} for image in annotations["images"]]
    truth = {"images": images, "annotations": [dict(a) for a in annotations["annotations"]], "categories": [{"id": 1}]}
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation.update(id=number, category_id=1)
        for name in ("bbox", "keypoints"):  # floats, however large the file's whole numbers are
            annotation[name] = np.asarray(annotation[name], dtype=np.float64).tolist()
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
        area, box = annotation.get("area"), annotation["bbox"]
        annotation["area"] = float(AREA * box[2] * box[3] if area is None else area)
    return truth


def coco_figures(
    annotations: dict[str, Any], found: list[dict[str, Any]], joints: Joints = COCO, backend: str | None = None
) -> dict[str, float]:
    """The ten figures of COCO's keypoint challenge, each in [0, 1], -1 where no ground truth is of that size.

    Args:
        annotations: ground truth, a COCO keypoint file's content.
        found: keypoint results.
        joints: whose sigmas judge.
        backend: "faster-coco-eval" or "pycocotools"; None takes the first where it is installed. Their figures are equal.
    """
    if not any(v > 0 for annotation in annotations["annotations"] for v in annotation["keypoints"][2::3]):
        return dict.fromkeys(FIGURES, -1.0)
    if not found:
        return dict.fromkeys(FIGURES, 0.0)
    run = _evaluated(annotations, found, joints, backend)
    with contextlib.redirect_stdout(io.StringIO()):
        run.summarize()
    return {name: float(value) for name, value in zip(FIGURES, run.stats[: len(FIGURES)], strict=True)}


def ap_by_size(
    annotations: dict[str, Any], found: list[dict[str, Any]], joints: Joints = COCO, backend: str | None = None
) -> dict[str, float]:
    """AP of the people of each class of `SIZES`, by "from-to" in pixels; classes without people are left out."""
    names = [f"{low}-{high}" if high < SIZES[-1] else f"{low}-" for low, high in pairwise(SIZES)]
    if not found:
        return {}
    run = _evaluated(annotations, found, joints, backend, [[low**2, high**2] for low, high in pairwise(SIZES)])
    precision = run.eval["precision"][:, :, 0, :, -1]  # thresholds, recalls, one category, sizes, most detections
    return {name: float(precision[..., i].mean()) for i, name in enumerate(names) if (precision[..., i] > -1).all()}


def _evaluated(
    annotations: dict[str, Any],
    found: list[dict[str, Any]],
    joints: Joints,
    backend: str | None,
    areas: list[list[float]] | None = None,
) -> Any:
    coco, evaluation = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both narrate
        truth = coco()
        truth.dataset = ground_truth(annotations)
        truth.createIndex()
        run = evaluation(truth, truth.loadRes([dict(pose) for pose in found]), "keypoints")
        run.params.kpt_oks_sigmas = np.array(joints.sigmas)
        if areas is not None:
            run.params.areaRng = areas
            run.params.areaRngLbl = [str(number) for number in range(len(areas))]
        run.evaluate()
        run.accumulate()
    return run


def _backend(name: str | None) -> tuple[Any, Any]:
    if name in (None, "faster-coco-eval"):
        try:
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        except ImportError:
            if name is not None:
                raise
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval
