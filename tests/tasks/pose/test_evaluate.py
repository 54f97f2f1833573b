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
    figures = evaluate.coco_figures(truth, fed_back(truth, 0.0, rng), backend=backend)
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
    figures = [evaluate.coco_figures(truth, found, backend=backend) for backend in ("pycocotools", "faster-coco-eval")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert 0.0 < figures[0]["AP"] < 1.0
    assert truth["annotations"][0]["id"] == 0, "the caller's annotations are left alone"


def test_nothing_found() -> None:
    """Zeros, not a crash of the evaluator."""
    assert set(evaluate.coco_figures(people(4, np.random.default_rng(0)), []).values()) == {0.0}


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
    figures = [evaluate.coco_figures(truth, found, backend=backend) for backend in ("pycocotools", "faster-coco-eval")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert figures[0]["AR"] == 1.0 if jitter == 0 else 0 < figures[0]["AP"] < 1
    sizes = [evaluate.ap_by_size(truth, found, backend=backend) for backend in ("pycocotools", "faster-coco-eval")]
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
