"""COCO's figures: exact on ground truth fed back, equal in both evaluators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.pose import evaluate


def people(count: int, rng: np.random.Generator, first_id: int = 0) -> dict[str, Any]:
    """Ground truth with ids from 0, some joints unlabelled, one crowd, one person without labelled joints."""
    annotations = []
    for i in range(count):
        size = rng.uniform(40, 200)
        points = rng.uniform(0, size, (17, 2)) + rng.uniform(0, 300, 2)
        visible = 2 * (rng.random(17) > 0.3)
        if i == 1:
            visible[:] = 0
        triples = np.column_stack([points * (visible[:, None] > 0), visible])
        annotations.append(
            {
                "id": first_id + i,
                "image_id": 1 + i // 2,
                "category_id": 1,
                "iscrowd": int(i == 2),
                "bbox": [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()],
                "area": float(np.ptp(points, axis=0).prod() * 0.6),
                "num_keypoints": int((visible > 0).sum()),
                "keypoints": triples.ravel().tolist(),
            }
        )
    images = [{"id": i, "width": 600, "height": 600, "file_name": f"{i}.jpg"} for i in range(1, count // 2 + 2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def fed_back(truth: dict[str, Any], jitter: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for annotation in truth["annotations"]:
        triples = np.array(annotation["keypoints"]).reshape(-1, 3)
        if not triples[:, 2].any():
            continue
        triples[:, :2] += rng.normal(0, 1, (17, 2)) * jitter
        score = float(rng.random())
        found.append(
            {"image_id": annotation["image_id"], "category_id": 1, "keypoints": triples.ravel().tolist(), "score": score}
        )
    return found


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_ground_truth_fed_back(backend: str) -> None:
    """AP is exactly 1. Kills: annotation id 0 taken as unmatched."""
    rng = np.random.default_rng(0)
    truth = people(12, rng)
    figures = evaluate.coco_figures(truth, fed_back(truth, 0.0, rng), backend)
    assert list(figures) == ["AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL"]
    assert figures["AP"] == figures["AR"] == 1.0


@pytest.mark.parametrize("jitter", [2.0, 8.0])
@pytest.mark.parametrize("without", [(), ("num_keypoints",), ("area", "iscrowd")])
def test_both_evaluators_agree(jitter: float, without: tuple[str, ...]) -> None:
    """To the last bits of a float64, on jittered people with false positives, and where fields are missing."""
    rng = np.random.default_rng(1)
    truth = people(20, rng)
    found = fed_back(truth, jitter, rng)
    found += fed_back(people(6, rng), 0.0, rng)
    for annotation in truth["annotations"]:
        for field in without:
            del annotation[field]
    figures = [evaluate.coco_figures(truth, found, backend) for backend in ("pycocotools", "faster-coco-eval")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert 0.0 < figures[0]["AP"] < 1.0
    assert truth["annotations"][0]["id"] == 0, "the caller's annotations are left alone"


def test_nothing_found() -> None:
    """Zeros, not a crash of the evaluator."""
    assert set(evaluate.coco_figures(people(4, np.random.default_rng(0)), []).values()) == {0.0}


def test_oks_by_hand() -> None:
    """exp(-d^2 / (2 s^2 k^2)) with s^2 the mean area and k = 2 sigma. Kills: a factor of two."""
    one = np.zeros((17, 2))
    other = one.copy()
    other[0, 0] = 3.0
    value = evaluate.oks(one, other[None], 100.0, np.array([300.0]))[0]
    expected = (16 + np.exp(-9 / (2 * 200.0 * (2 * 0.026) ** 2))) / 17
    assert value == pytest.approx(expected, abs=1e-12)


def test_oks_nms() -> None:
    """Keeps the best of near copies, in falling score."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 100, (17, 2))
    keypoints = np.stack([base, base + 0.5, base + 60, base])
    kept = evaluate.oks_nms(keypoints, np.array([0.5, 0.9, 0.7, 0.2]), np.full(4, 5000.0), 0.9)
    assert kept == [1, 2]


def test_rescoring() -> None:
    """Box score times the mean of the sure joints; none sure gives 0. Kills: the mean over all joints."""
    scores = np.zeros((2, 17))
    scores[0, :3] = [0.9, 0.5, 0.1]
    keypoints = np.zeros((2, 17, 2))
    found = evaluate.results(np.array([1, 2]), keypoints, scores, np.array([0.5, 1.0]), np.full(2, 100.0))
    assert [f["score"] for f in found] == pytest.approx([0.5 * 0.7, 0.0])
    assert found[0]["keypoints"][2::3][:3] == [0.9, 0.5, 0.1]
