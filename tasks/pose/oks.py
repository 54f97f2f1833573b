"""Object keypoint similarity, and what is made with it of a network's answers: rescored poses, near copies dropped.

# N people, K keypoints; coordinates in pixels of the picture, areas in square pixels
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def oks(one: Array, others: Array, area: float, areas: Array, sigmas: Array) -> Array:
    """Object keypoint similarity of one pose with others, over all joints, by the mean of the two areas.

    Args:
        one: [K, 2].
        others: [N, K, 2].
        area: of the one.
        areas: [N].
        sigmas: [K].

    Returns:
        [N], in [0, 1].
    """
    squares = ((others - one) ** 2).sum(axis=2)
    spread = 2 * (2 * sigmas) ** 2 * ((area + areas) / 2 + np.spacing(1))[:, None]
    return np.exp(-squares / spread).mean(axis=1)


def oks_nms(keypoints: Array, scores: Array, areas: Array, sigmas: Array, threshold: float = 0.9) -> list[int]:
    """Indices to keep: in falling score, those whose OKS with every kept one is at most the threshold."""
    order = np.argsort(scores)[::-1]
    points, sizes = keypoints[order], areas[order]
    alike = [oks(point, points, float(size), sizes, sigmas) for point, size in zip(points, sizes, strict=True)]
    left = np.ones(len(order), dtype=bool)
    keep: list[int] = []
    for i, index in enumerate(order):
        if left[i]:
            keep.append(int(index))
            left &= alike[i] <= threshold
    return keep


def soft_oks_nms(
    keypoints: Array, scores: Array, areas: Array, sigmas: Array, threshold: float = 0.9, most: int = 20
) -> tuple[list[int], list[float]]:
    """Soft-NMS (arXiv 1704.04503, eq. 5, with OKS): lower the scores of poses like a better one, instead of dropping them.

    After each pose that is taken, those that are left get s exp(-OKS^2 / threshold). mmpose takes the same poses in the same
    order, but hands out the scores from before.

    Args:
        keypoints: [N, K, 2].
        scores: [N].
        areas: [N].
        sigmas: [K].
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
        alike = oks(keypoints[first], keypoints[left], float(areas[first]), areas[left], sigmas)
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
    sigmas: Array,
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
        sigmas: [K], of the joint set.
        score_threshold: of joints that count in the score.
        nms_threshold: OKS above which the lower-scored pose is dropped; with soft_nms, of the scores' decay.
        soft_nms: lower the scores of near copies instead.
    """
    sure = joint_scores > score_threshold
    scores = box_scores * (joint_scores * sure).sum(axis=1) / np.maximum(sure.sum(axis=1), 1)
    order = np.argsort(image_ids, kind="stable")
    everywhere: list[int] = []
    for here in np.split(order, np.flatnonzero(np.diff(image_ids[order])) + 1) if len(order) else []:
        if soft_nms:
            kept, lowered = soft_oks_nms(keypoints[here], scores[here], areas[here], sigmas, nms_threshold)
            scores[here[kept]] = lowered
        else:
            kept = oks_nms(keypoints[here], scores[here], areas[here], sigmas, nms_threshold)
        everywhere += here[kept].tolist()
    triples = np.concatenate([keypoints, joint_scores[..., None]], axis=2).reshape(len(keypoints), -1)[everywhere].round(4)
    columns = (image_ids[everywhere].tolist(), triples.tolist(), scores[everywhere].tolist())
    return [
        {"image_id": image_id, "category_id": 1, "keypoints": values, "score": score}
        for image_id, values, score in zip(*columns, strict=True)
    ]
