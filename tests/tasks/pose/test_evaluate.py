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


@pytest.mark.parametrize("jitter", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_evaluators_agree_on_hard_cases(jitter: float, seed: int) -> None:
    """Crowds with people found in them, pictures without anybody, ids from 0 or far off, equal scores, 25 poses in a picture.

    Kills: a crowd that counts as missed, an unlabelled person that counts as one.
    """
    rng = np.random.default_rng(seed)
    truth = people(24, rng, first_id=[0, 0, 1, 10_000][seed])
    truth["images"].append({"id": 99, "width": 10, "height": 10, "file_name": "empty.jpg"})
    found = fed_back(truth, jitter, rng)
    crowd = truth["annotations"][2]
    found.append({"image_id": crowd["image_id"], "category_id": 1, "keypoints": crowd["keypoints"], "score": 0.99})
    found.append({"image_id": 99, "category_id": 1, "keypoints": [5.0] * 51, "score": 0.5})
    found += [{**found[0], "score": 0.25} for _ in range(25)]
    figures = [evaluate.coco_figures(truth, found, backend) for backend in ("pycocotools", "faster-coco-eval")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert figures[0]["AR"] == 1.0 if jitter == 0 else 0 < figures[0]["AP"] < 1
    sizes = [evaluate.ap_by_size(truth, found, backend) for backend in ("pycocotools", "faster-coco-eval")]
    assert sizes[0] == pytest.approx(sizes[1], abs=1e-12)


def test_ap_by_size() -> None:
    """A class is good where its people are found. Kills: edges that are areas, classes shifted by one."""
    rng = np.random.default_rng(0)
    truth = people(40, rng)
    for i, annotation in enumerate(truth["annotations"]):
        annotation["area"] = [50.0, 100.0][i % 2] ** 2
    found = fed_back(truth, 0.0, rng)
    for pose in found:
        owner = next(a for a in truth["annotations"] if a["keypoints"] == pose["keypoints"])
        if owner["area"] == 100.0**2:
            pose["keypoints"] = [v + 500 for v in pose["keypoints"]]
    by_size = evaluate.ap_by_size(truth, found)
    assert set(by_size) == {"0-64", "96-128"}
    assert by_size["0-64"] == 1.0
    assert by_size["96-128"] == 0.0


def test_soft_nms_by_hand() -> None:
    """The best as it is, its copy lowered by exp(-1 / threshold), a stranger hardly. Kills: dropped poses, a linear decay."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 100, (17, 2))
    keypoints = np.stack([base, base, base + 60])
    taken, scores = evaluate.soft_oks_nms(keypoints, np.array([0.8, 0.9, 0.5]), np.full(3, 1000.0), 0.9)
    assert taken == [1, 2, 0]
    assert scores[0] == 0.9
    assert scores[1] == pytest.approx(0.5, rel=1e-3)
    assert scores[2] == pytest.approx(0.8 * np.exp(-1 / 0.9), rel=1e-3)
    assert evaluate.soft_oks_nms(keypoints, np.array([0.8, 0.9, 0.5]), np.full(3, 1000.0), 0.9, most=2)[0] == [1, 2]


def test_soft_nms_in_the_results() -> None:
    """Copies stay, with lower scores. Kills: scores of the wrong poses, or of another picture's."""
    keypoints, scores = np.zeros((4, 17, 2)), np.full((4, 17), 0.5)
    keypoints[3] = 1000.0
    arguments = (np.array([7, 4, 4, 4]), keypoints, scores, np.array([0.2, 0.6, 1.0, 0.8]), np.full(4, 100.0))
    hard = evaluate.results(*arguments)
    soft = evaluate.results(*arguments, soft_nms=True)
    assert [pose["score"] for pose in hard] == pytest.approx([0.5, 0.4, 0.1])
    assert [pose["score"] for pose in soft] == pytest.approx([0.5, 0.4, 0.3 * np.exp(-1 / 0.9), 0.1])


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
    matches = evaluate.matched(truth, found)
    errors = matches.errors()
    assert np.isnan(errors[0, 1])
    np.testing.assert_allclose(np.delete(errors[0], 1), 0.05)
    assert np.isinf(errors[1]).all()
    assert matches.oks[1] == 0 < matches.oks[0]
    assert evaluate.pck(errors, 0.051) == pytest.approx(16 / 33)
    assert evaluate.pck(errors, 0.049) == 0


def test_error_report_of_the_truth() -> None:
    """Nothing is missed. Kills: joints under a neighbour's name, an area above 1."""
    rng = np.random.default_rng(0)
    truth = people(12, rng)
    for annotation in truth["annotations"]:
        annotation["keypoints"][3 * 16 :] = [0, 0, 0]  # nobody's right ankle is labelled
    report = evaluate.error_report(truth, fed_back(truth, 0.0, rng))
    assert report["pck"] == report["auc"] == 1.0
    assert set(report["joints"]) == set(evaluate.KEYPOINTS[:16])
    assert all(joint["pck"] == 1 and joint["median_error"] == 0 for joint in report["joints"].values())
