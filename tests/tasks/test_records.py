"""The run's folder: what is written when."""

from __future__ import annotations

from pathlib import Path

from tasks import log
from tests.tasks import toy


def test_best_is_the_best(tmp_path: Path) -> None:
    """best.pt is of the epoch with the highest metric."""
    toy.run(tmp_path)
    scores = {line["epoch"]: line["metrics"]["score"] for line in log.read(tmp_path / "metrics.jsonl") if "metrics" in line}
    best = max(scores, key=lambda e: scores[e])
    assert toy.weights(tmp_path, "best.pt")["progress"]["step"] == 5 * best
