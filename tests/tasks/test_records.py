"""The run's folder: what is written when."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import log
from tasks.errors import UserError
from tests.tasks import toy


def test_best_is_the_best(tmp_path: Path) -> None:
    """best.pt is of the epoch with the highest metric."""
    toy.run(tmp_path)
    scores = {line["epoch"]: line["metrics"]["score"] for line in log.read(tmp_path / "metrics.jsonl") if "metrics" in line}
    best = max(scores, key=lambda e: scores[e])
    assert toy.weights(tmp_path, "best.pt")["progress"]["step"] == 5 * best


def test_lines_are_appended(tmp_path: Path) -> None:
    """Kills: a file that is written anew with every line, a torn line that another one is put behind."""
    metrics = log.Metrics(tmp_path / "metrics.jsonl", [{"epoch": 1}])
    number = (tmp_path / "metrics.jsonl").stat().st_ino
    metrics.write({"epoch": 2})
    assert (tmp_path / "metrics.jsonl").stat().st_ino == number
    metrics._whole = False  # as after a write for which there was no room
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"epo')
    metrics.write({"epoch": 3})
    assert log.read(tmp_path / "metrics.jsonl") == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]


class Rising(toy.Toy):
    """A toy that gets better with every evaluation."""

    def evaluate(self, model: Any, batches: Any, out: Path | None = None) -> dict[str, float]:
        """The number of batches that its statistics have seen."""
        return {"score": float(model[1].num_batches_tracked)}


def test_best_is_last_where_it_is_the_same_state(tmp_path: Path) -> None:
    """Kills: the same bytes written twice."""
    toy.run(tmp_path, task=Rising(), epochs=2)
    assert os.path.samefile(tmp_path / "best.pt", tmp_path / "last.pt")


def test_curves_are_drawn_at_most_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch, then every minute, and the end."""
    drawn: list[int] = []
    clock, epoch = time.perf_counter, [0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 25 * epoch[0])

    def draw(path: Path, lines: list[dict[str, Any]], metric: str) -> None:
        drawn.append(lines[-1]["epoch"])

    class Slow(toy.Toy):
        def evaluate(self, model: Any, batches: Any, out: Path | None = None) -> dict[str, float]:
            epoch[0] += 1
            return super().evaluate(model, batches, out)

    monkeypatch.setattr(log, "draw_curves", draw)
    toy.run(tmp_path, task=Slow(), epochs=6)
    assert drawn == [1, 4, 6]


@dataclasses.dataclass(frozen=True)
class Failing(toy.Toy):
    """Cannot be evaluated."""

    fails: bool = True

    def evaluate(self, model: Any, batches: Any, out: Path | None = None) -> dict[str, float]:
        """Nothing."""
        if self.fails:
            raise UserError("no evaluation")
        return super().evaluate(model, batches, out)


def test_an_evaluation_that_fails_costs_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed, it is made first. Kills: an evaluation before the checkpoint, or one that a resumed run leaves out."""
    expected = toy.run(tmp_path / "whole", task=Failing(fails=False), epochs=2)
    with pytest.raises(UserError, match="no evaluation"):
        toy.run(tmp_path / "run", task=Failing(), epochs=2)
    assert toy.weights(tmp_path / "run")["progress"]["step"] == 5
    monkeypatch.setattr(Failing, "evaluate", toy.Toy.evaluate)
    assert toy.run(tmp_path / "run", task=Failing(), epochs=2, resume=True)["metrics"] == expected["metrics"]
    lines = log.read(tmp_path / "run/metrics.jsonl")
    assert [(line["epoch"], "metrics" in line) for line in lines] == [(1, False), (1, True), (2, False), (2, True)]
    toy.assert_same(toy.weights(tmp_path / "run")["model"], toy.weights(tmp_path / "whole")["model"])
