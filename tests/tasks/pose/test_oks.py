"""Object keypoint similarity by hand, and what is kept and scored with it."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.pose import oks
from tasks.pose.joints import COCO

SIGMAS = np.array(COCO.sigmas)


def test_oks_by_hand() -> None:
    """exp(-d^2 / (2 s^2 k^2)) with s^2 the mean area and k = 2 sigma. Kills: a factor of two."""
    one = np.zeros((17, 2))
    other = one.copy()
    other[0, 0] = 3.0
    value = oks.oks(one, other[None], 100.0, np.array([300.0]), SIGMAS)[0]
    expected = (16 + np.exp(-9 / (2 * 200.0 * (2 * 0.026) ** 2))) / 17
    assert value == pytest.approx(expected, abs=1e-12)


def test_oks_nms() -> None:
    """Keeps the best of near copies, in falling score."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 100, (17, 2))
    keypoints = np.stack([base, base + 0.5, base + 60, base])
    kept = oks.oks_nms(keypoints, np.array([0.5, 0.9, 0.7, 0.2]), np.full(4, 5000.0), SIGMAS, 0.9)
    assert kept == [1, 2]


def test_rescoring() -> None:
    """Box score times the mean of the sure joints; none sure gives 0. Kills: the mean over all joints."""
    scores = np.zeros((2, 17))
    scores[0, :3] = [0.9, 0.5, 0.1]
    keypoints = np.zeros((2, 17, 2))
    found = oks.results(np.array([1, 2]), keypoints, scores, np.array([0.5, 1.0]), np.full(2, 100.0), sigmas=SIGMAS)
    assert [f["score"] for f in found] == pytest.approx([0.5 * 0.7, 0.0])
    assert found[0]["keypoints"][2::3][:3] == [0.9, 0.5, 0.1]


def test_soft_nms_by_hand() -> None:
    """The best as it is, its copy lowered by exp(-1 / threshold), a stranger hardly. Kills: dropped poses, a linear decay."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 100, (17, 2))
    keypoints = np.stack([base, base, base + 60])
    taken, scores = oks.soft_oks_nms(keypoints, np.array([0.8, 0.9, 0.5]), np.full(3, 1000.0), SIGMAS, 0.9)
    assert taken == [1, 2, 0]
    assert scores[0] == 0.9
    assert scores[1] == pytest.approx(0.5, rel=1e-3)
    assert scores[2] == pytest.approx(0.8 * np.exp(-1 / 0.9), rel=1e-3)
    assert oks.soft_oks_nms(keypoints, np.array([0.8, 0.9, 0.5]), np.full(3, 1000.0), SIGMAS, 0.9, most=2)[0] == [1, 2]


def test_soft_nms_in_the_results() -> None:
    """Copies stay, with lower scores. Kills: scores of the wrong poses, or of another picture's."""
    keypoints, scores = np.zeros((4, 17, 2)), np.full((4, 17), 0.5)
    keypoints[3] = 1000.0
    arguments = (np.array([7, 4, 4, 4]), keypoints, scores, np.array([0.2, 0.6, 1.0, 0.8]), np.full(4, 100.0))
    hard = oks.results(*arguments, sigmas=SIGMAS)
    soft = oks.results(*arguments, sigmas=SIGMAS, soft_nms=True)
    assert [pose["score"] for pose in hard] == pytest.approx([0.5, 0.4, 0.1])
    assert [pose["score"] for pose in soft] == pytest.approx([0.5, 0.4, 0.3 * np.exp(-1 / 0.9), 0.1])
