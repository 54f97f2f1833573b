"""COCO keypoint evaluation: rescoring, OKS-NMS and the ten figures.

# N people, K = 17 keypoints; coordinates in pixels of the picture, areas in square pixels
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.pose.data import KEYPOINTS

Array = NDArray[np.float64]

# pycocotools Params.kpt_oks_sigmas
SIGMAS = np.array([0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]) / 10
FIGURES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


def oks(one: Array, others: Array, area: float, areas: Array) -> Array:
    """Object keypoint similarity of one pose with others, over all joints, by the mean of the two areas.

    Args:
        one: [K, 2].
        others: [N, K, 2].
        area: of the one.
        areas: [N].

    Returns:
        [N], in [0, 1].
    """
    squares = ((others - one) ** 2).sum(axis=2)
    spread = 2 * (2 * SIGMAS) ** 2 * ((area + areas) / 2 + np.spacing(1))[:, None]
    return np.exp(-squares / spread).mean(axis=1)


def oks_nms(keypoints: Array, scores: Array, areas: Array, threshold: float = 0.9) -> list[int]:
    """Indices to keep: in falling score, those whose OKS with every kept one is at most the threshold."""
    order = np.argsort(scores)[::-1]
    keep: list[int] = []
    while len(order):
        first, rest = order[0], order[1:]
        keep.append(int(first))
        order = rest[oks(keypoints[first], keypoints[rest], float(areas[first]), areas[rest]) <= threshold]
    return keep


def results(
    image_ids: NDArray[np.int64],
    keypoints: Array,
    joint_scores: Array,
    box_scores: Array,
    areas: Array,
    *,
    score_threshold: float = 0.2,
    nms_threshold: float = 0.9,
) -> list[dict[str, Any]]:
    """COCO keypoint results of N people.

    The score is the box's times the mean score of the joints above the threshold, 0 where none is; then OKS-NMS inside
    each picture. Areas are those of the padded boxes, as in mmpose.

    Args:
        image_ids: [N].
        keypoints: [N, K, 2].
        joint_scores: [N, K].
        box_scores: [N].
        areas: [N].
        score_threshold: of joints that count in the score.
        nms_threshold: OKS above which the lower-scored pose is dropped.
    """
    sure = joint_scores > score_threshold
    scores = box_scores * (joint_scores * sure).sum(axis=1) / np.maximum(sure.sum(axis=1), 1)
    found = []
    for image_id in np.unique(image_ids):
        here = np.flatnonzero(image_ids == image_id)
        for k in here[oks_nms(keypoints[here], scores[here], areas[here], nms_threshold)]:
            triples = np.concatenate([keypoints[k], joint_scores[k][:, None]], axis=1)
            found.append(
                {
                    "image_id": int(image_id),
                    "category_id": 1,
                    "keypoints": [round(float(v), 4) for v in triples.ravel()],
                    "score": float(scores[k]),
                }
            )
    return found


def normalised(annotations: dict[str, Any]) -> dict[str, Any]:
    """Ground truth as every evaluator reads it alike.

    An annotation id of 0 counts as unmatched in pycocotools, so ids start at 1 here; a missing num_keypoints, area or
    iscrowd is filled in.
    """
    truth = copy.deepcopy(annotations)
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
        annotation.setdefault("area", 0.53 * annotation["bbox"][2] * annotation["bbox"][3])  # mmpose's share of the box
    return truth


def coco_figures(annotations: dict[str, Any], found: list[dict[str, Any]], backend: str | None = None) -> dict[str, float]:
    """The ten figures of COCO's keypoint challenge, each in [0, 1], -1 where no ground truth is of that size.

    Args:
        annotations: ground truth, a COCO keypoint file's content.
        found: keypoint results.
        backend: "faster-coco-eval" or "pycocotools"; None takes the first where it is installed. Their figures are equal.
    """
    if not found:
        return dict.fromkeys(FIGURES, 0.0)
    coco, evaluation = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both narrate
        truth = coco()
        truth.dataset = normalised(annotations)
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(copy.deepcopy(found)), "keypoints")
        run.params.kpt_oks_sigmas = SIGMAS
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(value) for name, value in zip(FIGURES, run.stats[: len(FIGURES)], strict=True)}


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


assert len(SIGMAS) == len(KEYPOINTS)
