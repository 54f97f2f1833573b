"""Distances of the best poses, and the report that is made of them."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.pose import errors
from tasks.pose.joints import COCO
from tests.tasks.pose.test_evaluate import fed_back, people


def test_errors_by_hand() -> None:
    """Distances over the box's larger side; unlabelled joints nan, people without a pose inf; the pose of the largest OKS.

    Kills: the smaller side, the first pose of a picture in place of the best, unlabelled joints as missed.
    """
    truth = people(2, np.random.default_rng(0))
    person, absent = truth["annotations"]
    person.update(keypoints=[10.0, 10.0, 2] * 17, bbox=[0, 0, 50, 100], area=3000.0, num_keypoints=16)
    person["keypoints"][3:6] = [0, 0, 0]
    absent.update(keypoints=[10.0, 10.0, 2] * 17, num_keypoints=17, image_id=7)
    near, far = [13.0, 14.0, 0.9] * 17, [60.0, 14.0, 0.9] * 17
    found = [{"image_id": 1, "category_id": 1, "keypoints": k, "score": 0.5} for k in (far, near)]
    matches = errors.matched(truth, found)
    distances = matches.errors()
    assert np.isnan(distances[0, 1])
    np.testing.assert_allclose(np.delete(distances[0], 1), 0.05)
    assert np.isinf(distances[1]).all()
    assert matches.oks[1] == 0 < matches.oks[0]
    assert errors.share_within(distances, 0.051) == pytest.approx(16 / 33)
    assert errors.share_within(distances, 0.049) == 0


def test_error_report_of_the_truth() -> None:
    """Nothing is missed. Kills: joints under a neighbour's name, an area above 1."""
    rng = np.random.default_rng(0)
    truth = people(12, rng)
    for annotation in truth["annotations"]:
        annotation["keypoints"][3 * 16 :] = [0, 0, 0]  # nobody's right ankle is labelled
    report = errors.error_report(truth, fed_back(truth, 0.0, rng))
    assert report["pck"] == report["auc"] == 1.0
    assert set(report["joints"]) == set(COCO.names[:16])
    assert all(joint["pck"] == 1 and joint["median_error"] == 0 for joint in report["joints"].values())
