"""Suites that start from a config: the same rows, in folders as the training tool makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.compare import records, study
from benchmarks.compare.rows import ROWS
from benchmarks.compare.schema import Large
from benchmarks.compare.suites import SUITES
from tasks.task import Batch
from tests.tasks import toy

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held(toy.Toy):
    """The toy task, whose score says whether it was asked of held-out data."""

    held_out: float = 0.0

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """100 and more on the test data."""
        list(batches)
        return {"score": (0.0 if self.held_out else 100.0) + float(sum(p.square().sum() for p in model.parameters()))}


def test_a_suite_of_a_config(tmp_path: Path) -> None:
    """Searched on held-out data, run on the test data, kept, each row with its passes.

    Kills: a search on the test data, a search as long as the runs where a shorter one is asked for.
    """
    rows = tuple(row for row in ROWS if row.name in ("base", "sam", "budget-1.2"))
    config = replace(toy.config, task=Held(), epochs=2)
    suite = Large("toy", config, rows, rhos=(0.1, 0.1 * 2**0.5), seeds=1, tune_epochs=1)
    study.compare(suite, tmp_path, 1, CPU)
    lines = records.read(tmp_path / "toy.jsonl")
    runs = {line["row"]: line for line in lines if line["kind"] == "run"}
    assert list(runs) == ["base", "sam", "budget-1.2"]
    assert all(line["score"] > 100 for line in runs.values())
    tuned = [line for line in lines if line["kind"] == "tune"]
    assert len(tuned) >= 4 and all(line["score"] < 100 for line in tuned)
    assert {2 * line["steps"] for line in tuned} == {line["steps"] for line in runs.values()}
    assert [runs[name]["passes_per_step"] for name in runs] == pytest.approx([1.0, 2.0, 1.2], abs=0.1)
    assert (tmp_path / "toy/base-test-0/result.json").exists()
    before = (tmp_path / "toy.jsonl").read_text()
    study.compare(suite, tmp_path, 1, CPU)
    assert (tmp_path / "toy.jsonl").read_text() == before


def test_the_large_suites_hold_out_training_data() -> None:
    """Kills: a config whose task cannot choose rho without its test data, rows that its task cannot serve."""
    large = [suite for suite in SUITES.values() if isinstance(suite, Large)]
    names = {"lspet-lite0", "lite0-w4a4", "cifar10-resnet18", "cifar10-wrn28", "coco-hrnet-w32", "imagenet-w4a4"}
    assert {suite.name for suite in large} == names
    for suite in large:
        assert replace(suite.config.task, held_out=suite.held_out).held_out in (0.1, 0.2)  # type: ignore[type-var]
        assert {row.name for row in suite.rows} >= {"base", "sam", "budget-1.2", "published"}
        assert not any(row.reestimate or row.part < 1 or row.early for row in suite.rows)
