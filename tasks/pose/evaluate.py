"""COCO keypoint evaluation: rescoring, OKS-NMS, the ten figures, and where the errors are.

# N people, K = 17 keypoints; coordinates in pixels of the picture, areas in square pixels
"""

from __future__ import annotations

import contextlib
import copy
import io
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.pose.data import KEYPOINTS

Array = NDArray[np.float64]

# pycocotools Params.kpt_oks_sigmas
SIGMAS = np.array([0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]) / 10
PCK = 0.05  # of the box's larger side, as mmpose's PCKAccuracy by "bbox"
REACHES = np.linspace(0, 0.2, 41)  # of the PCK curve
SIZES = (0, 64, 96, 128, 192, 256, 100_000)  # edges of the classes of sqrt(area) in pixels; COCO's M ends and L begins at 96
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


def soft_oks_nms(
    keypoints: Array, scores: Array, areas: Array, threshold: float = 0.9, most: int = 20
) -> tuple[list[int], list[float]]:
    """Soft-NMS (arXiv 1704.04503, eq. 5, with OKS): lower the scores of poses like a better one, instead of dropping them.

    After each pose that is taken, those that are left get s exp(-OKS^2 / threshold). mmpose takes the same poses in the same
    order, but hands out the scores from before.

    Args:
        keypoints: [N, K, 2].
        scores: [N].
        areas: [N].
        threshold: of the decay, > 0.
        most: poses that are taken.

    Returns:
        Indices, and their lowered scores.
    """
    left, scores = np.argsort(scores)[::-1], scores.copy()
    taken: list[int] = []
    while len(left) and len(taken) < most:
        first, left = left[0], left[1:]
        taken.append(int(first))
        alike = oks(keypoints[first], keypoints[left], float(areas[first]), areas[left])
        scores[left] *= np.exp(-(alike**2) / threshold)
        left = left[np.argsort(scores[left])[::-1]]
    return taken, scores[taken].tolist()


def results(
    image_ids: NDArray[np.int64],
    keypoints: Array,
    joint_scores: Array,
    box_scores: Array,
    areas: Array,
    *,
    score_threshold: float = 0.2,
    nms_threshold: float = 0.9,
    soft_nms: bool = False,
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
        nms_threshold: OKS above which the lower-scored pose is dropped; with soft_nms, of the scores' decay.
        soft_nms: lower the scores of near copies instead.
    """
    sure = joint_scores > score_threshold
    scores = box_scores * (joint_scores * sure).sum(axis=1) / np.maximum(sure.sum(axis=1), 1)
    found = []
    for image_id in np.unique(image_ids):
        here = np.flatnonzero(image_ids == image_id)
        if soft_nms:
            kept, lowered = soft_oks_nms(keypoints[here], scores[here], areas[here], nms_threshold)
            scores[here[kept]] = lowered
        else:
            kept = oks_nms(keypoints[here], scores[here], areas[here], nms_threshold)
        for k in here[kept]:
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
    iscrowd is filled in. Everybody is a person, whatever the file calls them: so are the results.
    """
    images = [{"id": image["id"]} for image in annotations["images"]]
    truth = {"images": images, "annotations": copy.deepcopy(annotations["annotations"]), "categories": [{"id": 1}]}
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation.update(id=number, category_id=1)
        for name in ("bbox", "keypoints"):  # floats, however large the file's whole numbers are
            annotation[name] = np.asarray(annotation[name], dtype=np.float64).tolist()
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
        box: Any = annotation["bbox"]
        annotation["area"] = float(annotation.get("area", 0.53 * box[2] * box[3]))  # without one, mmpose's share of the box
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
    run = _evaluated(annotations, found, backend)
    with contextlib.redirect_stdout(io.StringIO()):
        run.summarize()
    return {name: float(value) for name, value in zip(FIGURES, run.stats[: len(FIGURES)], strict=True)}


def ap_by_size(annotations: dict[str, Any], found: list[dict[str, Any]], backend: str | None = None) -> dict[str, float]:
    """AP of the people of each class of `SIZES`, by "from-to" in pixels; classes without people are left out."""
    names = [f"{low}-{high}" if high < SIZES[-1] else f"{low}-" for low, high in pairwise(SIZES)]
    if not found:
        return {}
    run = _evaluated(annotations, found, backend, [[low**2, high**2] for low, high in pairwise(SIZES)])
    precision = run.eval["precision"][:, :, 0, :, -1]  # thresholds, recalls, one category, sizes, most detections
    return {name: float(precision[..., i].mean()) for i, name in enumerate(names) if (precision[..., i] > -1).all()}


def _evaluated(
    annotations: dict[str, Any], found: list[dict[str, Any]], backend: str | None, areas: list[list[float]] | None = None
) -> Any:
    coco, evaluation = _backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both narrate
        truth = coco()
        truth.dataset = normalised(annotations)
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(copy.deepcopy(found)), "keypoints")
        run.params.kpt_oks_sigmas = SIGMAS
        if areas is not None:
            run.params.areaRng = areas
            run.params.areaRngLbl = [str(number) for number in range(len(areas))]
        run.evaluate()
        run.accumulate()
    return run


class Matches(NamedTuple):
    """Annotated people, each with the pose in its picture that is most like it.

    Args:
        people: N annotations with a labelled joint, no crowds.
        poses: [N, K, 3] x, y, score; nan where nothing was found in the picture.
        oks: [N], over the labelled joints; 0 where nothing was found.
    """

    people: list[dict[str, Any]]
    poses: Array
    oks: Array

    def errors(self) -> Array:
        """Distances [N, K] as shares of the box's larger side; nan for unlabelled joints, inf where nothing was found."""
        truth = np.array([person["keypoints"] for person in self.people], dtype=np.float64).reshape(-1, len(KEYPOINTS), 3)
        sides = np.array([max(person["bbox"][2:]) for person in self.people])
        distances = np.linalg.norm(self.poses[..., :2] - truth[..., :2], axis=2) / np.maximum(sides, 1.0)[:, None]
        return np.where(truth[..., 2] > 0, np.where(np.isnan(distances), np.inf, distances), np.nan)


def matched(annotations: dict[str, Any], found: list[dict[str, Any]]) -> Matches:
    """Find for each annotated person the pose of the largest OKS; several people may share one."""
    truth = normalised(annotations)["annotations"]
    people = [person for person in truth if person["num_keypoints"] > 0 and not person["iscrowd"]]
    poses = np.full((len(people), len(KEYPOINTS), 3), np.nan)
    similarity = np.zeros(len(people))
    by_picture: dict[int, list[Any]] = {}
    for pose in found:
        by_picture.setdefault(pose["image_id"], []).append(np.array(pose["keypoints"]).reshape(-1, 3))
    for i, person in enumerate(people):
        if person["image_id"] not in by_picture:
            continue
        here = np.stack(by_picture[person["image_id"]])
        joints = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
        seen = joints[:, 2] > 0
        squares = ((here[:, seen, :2] - joints[seen, :2]) ** 2).sum(axis=2)
        spread = 2 * (2 * SIGMAS[seen]) ** 2 * (person["area"] + np.spacing(1))
        alike = np.exp(-squares / spread).mean(axis=1)
        poses[i], similarity[i] = here[alike.argmax()], alike.max()
    return Matches(people, poses, similarity)


def pck(errors: Array, reach: float) -> float:
    """Share of the labelled joints whose error is at most `reach`: PCK (arXiv 1312.4659's measure, by the box)."""
    return float((errors[~np.isnan(errors)] <= reach).mean())


def error_report(annotations: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the errors are: PCK and median error of each joint, the PCK curve and its area, and AP by size."""
    errors = matched(annotations, found).errors()
    joints = {}
    for k, name in enumerate(KEYPOINTS):
        own = errors[:, k][~np.isnan(errors[:, k])]
        if len(own):
            joints[name] = {"labelled": len(own), "pck": pck(own, PCK), "median_error": float(np.median(own))}
    curve = [pck(errors, reach) for reach in REACHES]
    return {
        "pck": pck(errors, PCK),
        "auc": float(np.trapezoid(curve, REACHES) / REACHES[-1]),
        "curve": {"reach": REACHES.tolist(), "pck": curve},
        "joints": joints,
        "ap_by_size": ap_by_size(annotations, found),
    }


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
