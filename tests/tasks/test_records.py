"""The run's folder: what is written when."""

from __future__ import annotations

import dataclasses
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from arsam import ARSAM
from arsam.sampling import Budget, GradientNorm, Tail
from tasks import checkpoint, log
from tasks.errors import UserError
from tasks.step import Step
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


def test_a_checkpoint_in_the_midst_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed bitwise after a fault between two. Kills: save_every that is not looked at, sums that are lost."""
    toy.run(tmp_path / "whole", epochs=2)
    taken = Step.__call__

    def fail(self: Step, batch: Any) -> None:
        if self._state.progress.step == 7:
            raise ZeroDivisionError
        taken(self, batch)

    monkeypatch.setattr(Step, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        toy.run(tmp_path / "cut", epochs=2, save_every=1e-9)
    assert toy.weights(tmp_path / "cut")["progress"]["step"] == 7
    monkeypatch.setattr(Step, "__call__", taken)
    toy.run(tmp_path / "cut", epochs=2, resume=True)
    a, b = (toy.weights(tmp_path / name) for name in ("whole", "cut"))
    toy.assert_same({**a, "config": 0}, {**b, "config": 0})


def test_what_changes_no_weight_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And more epochs go on. Kills: a run that cannot be looked at more often, or trained for longer."""
    toy.run(tmp_path, epochs=2)
    capsys.readouterr()
    result = toy.run(tmp_path, epochs=3, eval_every=2, patience=3, num_workers=1, save_every=1.0, resume=True)
    assert result["steps"] == 15
    assert "epochs was 2, is 3: from here on the learning rate and the rules are those of a run of 3" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has done 3 epochs already, epochs=1 asks for fewer"):
        toy.run(tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("step", "7"),
        ("step", 7.0),
        ("step", -5),
        ("step", True),
        ("seconds", -1.0),
        ("passes", 2),
        ("best", "good"),
        ("skipped", None),
    ],
)
def test_a_tampered_last_pt(tmp_path: Path, where: str, value: Any) -> None:
    """Values of another type or sign. Kills: a traceback, a run that goes on from nowhere."""
    toy.run(tmp_path, epochs=2)
    saved = toy.weights(tmp_path)
    saved["progress"][where] = value
    checkpoint.save(tmp_path / "last.pt", saved)
    with pytest.raises(UserError, match=r"last\.pt: not the checkpoint of a run of this version"):
        toy.run(tmp_path, epochs=3, resume=True)


@pytest.mark.parametrize("rule", [partial(Tail, 0.3), partial(Budget, 1.2), partial(GradientNorm, 1, -1)])
def test_more_epochs_with_a_rule_that_knows_their_number(tmp_path: Path, rule: Any) -> None:
    """Kills: a rule's total_steps taken for another rule."""
    sharpness = partial(ARSAM, rho=0.1, sampling=rule)
    toy.run(tmp_path, epochs=1, sharpness=sharpness)
    assert toy.run(tmp_path, epochs=2, sharpness=sharpness, resume=True)["steps"] == 10


def test_a_tampered_momentum(tmp_path: Path) -> None:
    """Shows at the first step. Kills: a traceback out of the optimizer."""
    toy.run(tmp_path, epochs=2)
    saved = toy.weights(tmp_path)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    checkpoint.save(tmp_path / "last.pt", saved)
    with pytest.raises(UserError, match="the checkpoint is not that of a run of this version"):
        toy.run(tmp_path, epochs=3, resume=True)
