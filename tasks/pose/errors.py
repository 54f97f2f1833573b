"""Where the errors are: each person's best pose, the share of joints within reach (PCK), and AP by size.

# N people, K keypoints; coordinates in pixels of the picture
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.pose import evaluate
from tasks.pose.joints import COCO, Joints

Array = NDArray[np.float64]

PCK = 0.05  # of the box's larger side, as mmpose's PCKAccuracy by "bbox"
REACHES = np.linspace(0, 0.2, 41)  # of the PCK curve


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
        truth = np.array([person["keypoints"] for person in self.people], dtype=np.float64).reshape(*self.poses.shape)
        sides = np.array([max(person["bbox"][2:]) for person in self.people])
        distances = np.linalg.norm(self.poses[..., :2] - truth[..., :2], axis=2) / np.maximum(sides, 1.0)[:, None]
        return np.where(truth[..., 2] > 0, np.where(np.isnan(distances), np.inf, distances), np.nan)


def matched(annotations: dict[str, Any], found: list[dict[str, Any]], joints: Joints = COCO) -> Matches:
    """Find for each annotated person the pose of the largest OKS; several people may share one."""
    truth = evaluate.ground_truth(annotations)["annotations"]
    people = [person for person in truth if person["num_keypoints"] > 0 and not person["iscrowd"]]
    poses = np.full((len(people), len(joints), 3), np.nan)
    similarity, sigmas = np.zeros(len(people)), np.array(joints.sigmas)
    by_picture: dict[int, list[Any]] = {}
    for pose in found:
        by_picture.setdefault(pose["image_id"], []).append(np.array(pose["keypoints"]).reshape(-1, 3))
    for i, person in enumerate(people):
        if person["image_id"] not in by_picture:
            continue
        here = np.stack(by_picture[person["image_id"]])
        true = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
        seen = true[:, 2] > 0
        squares = ((here[:, seen, :2] - true[seen, :2]) ** 2).sum(axis=2)
        spread = 2 * (2 * sigmas[seen]) ** 2 * (person["area"] + np.spacing(1))
        alike = np.exp(-squares / spread).mean(axis=1)
        poses[i], similarity[i] = here[alike.argmax()], alike.max()
    return Matches(people, poses, similarity)


def share_within(errors: Array, reach: float) -> float:
    """Share of the labelled joints whose error is at most `reach`: PCK (arXiv 1312.4659's measure, by the box)."""
    return float((errors[~np.isnan(errors)] <= reach).mean())


def _curve(errors: Array) -> tuple[list[float], float]:
    """PCK at each of `REACHES`, and the area under it, in [0, 1]."""
    curve = [share_within(errors, reach) for reach in REACHES]
    return curve, float(np.trapezoid(curve, REACHES) / REACHES[-1])


def figures(annotations: dict[str, Any], found: list[dict[str, Any]], joints: Joints) -> dict[str, float]:
    """PCK and AUC, which need no sigmas; -1 where nobody is annotated."""
    errors = matched(annotations, found, joints).errors()
    if not len(errors):
        return {"PCK": -1.0, "AUC": -1.0}
    return {"PCK": share_within(errors, PCK), "AUC": _curve(errors)[1]}


def error_report(
    annotations: dict[str, Any], found: list[dict[str, Any]], joints: Joints = COCO, matches: Matches | None = None
) -> dict[str, Any]:
    """Where the errors are: PCK and median error of each joint, the PCK curve and its area, and AP by size."""
    errors = (matched(annotations, found, joints) if matches is None else matches).errors()
    by_joint = {}
    for k, name in enumerate(joints.names):
        own = errors[:, k][~np.isnan(errors[:, k])]
        if len(own):
            by_joint[name] = {"labelled": len(own), "pck": share_within(own, PCK), "median_error": float(np.median(own))}
    curve, auc = _curve(errors)
    return {
        "pck": share_within(errors, PCK),
        "auc": auc,
        "curve": {"reach": REACHES.tolist(), "pck": curve},
        "joints": by_joint,
        "ap_by_size": evaluate.ap_by_size(annotations, found, joints),
    }
