"""A setting chosen by short runs, from the command line and in parts."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import tune
from tasks.errors import UserError
from tests.tasks import toy

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# A task of milliseconds whose held-out score is best near weight decay 0.02.
CONFIG = """
from dataclasses import dataclass, replace
from functools import partial
import torch
from torch.optim import SGD
from arsam import ARSAM
from arsam.sampling import Periodic
from tasks.config import Config
from tests.tasks.toy import Toy

@dataclass(frozen=True)
class Held(Toy):
    held_out: float = 0.0

    def evaluate(self, model, batches, out=None):
        assert self.held_out == 0.2
        list(batches)
        return {"score": float(sum(p.square().sum() for p in model.parameters()))}

config = Config(
    task=Held(), optimizer=partial(SGD, lr=0.05, weight_decay=0.1), epochs=4, batch_size=7, num_workers=0,
    sharpness=partial(ARSAM, rho=0.05, sampling=partial(Periodic, every=2)),
)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def call(*arguments: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, arguments), "--device", "cpu"])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    try:
        runpy.run_path(str(ROOT / "tools/tune.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def plan(values: tuple[str, ...] = (), **settings: Any) -> tune.Plan:
    return tune.Plan(toy.config, "toy", "optimizer.lr", values, held_out=0.0, **settings)


def test_from_the_command_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, a picture, the line, the cost; a second call runs nothing. Kills: the worst value, runs without halving."""
    out = tmp_path / "out"
    words = [config, "--name", "optimizer.lr", "--values", 0.4, 0.0001, 0.1, "--out", out, "--share", 0.5]
    assert call(*words, "seed=3", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    trials = json.loads((out / "tune.json").read_text())["trials"]
    assert [(t["value"], t["epochs"]) for t in trials[:3]] == [("0.4", 1), ("0.0001", 1), ("0.1", 1)]
    ranked = sorted(trials[:3], key=lambda t: -t["score"])
    assert [(t["value"], t["epochs"]) for t in trials[3:]] == [(t["value"], 2) for t in ranked[:2]], "the better half"
    chosen = max(trials[3:], key=lambda t: t["score"])
    assert printed.splitlines()[-1] == f"optimizer.lr={chosen['value']}"
    assert f"5 short runs, {sum(t['passes'] for t in trials)} forward-backward passes" in printed
    assert (out / "tune.png").stat().st_size > 1000 and not list(out.rglob("*.pt"))
    assert call(*words, "seed=3", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    assert json.loads((out / "tune.json").read_text())["trials"] == trials
    assert call(*words, "seed=4", monkeypatch=monkeypatch) == 2
    assert "of another config, setting or share; name another --out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    assert call(config, "--out", tmp_path / "mine", monkeypatch=monkeypatch) == 2
    assert "holds files that tools/tune.py did not write (thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "sharpness.roh"], "unknown name roh; did you mean rho?"),
        (["--name", "optimizer.lr", "--values", "fast"], "optimizer.lr=fast: expected float"),
        (["--name", "optimizer.momentum"], "is 0, no number > 0 to search around; give --values"),
        (["--share", "0"], "--share must lie in (0, 1], got 0.0"),
        (["--held-out", "1"], "--held-out must lie in [0, 1), got 1.0"),
    ],
)
def test_mistakes(
    config: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and a line that says what to do. Kills: a traceback."""
    assert call(config, *arguments, "--out", tmp_path / "out", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and said.count("\n") <= 2


def test_a_task_that_holds_nothing_out() -> None:
    """Kills: a search on the split that the results are from, unasked."""
    held = tune.Plan(toy.config, "toy", "optimizer.lr")
    with pytest.raises(UserError, match="the task toy has no field held_out.*--held-out 0"):
        held.trial("0.1", 1)


def test_the_ladder_goes_on_beyond_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an interrupted search goes on where it stopped. Kills: an edge taken for a best, trials run twice."""
    asked: list[tuple[str, int]] = []

    def train(plan: tune.Plan, value: str, epochs: int, out: Path, device: torch.device) -> tune.Trial:
        asked.append((value, epochs))
        if len(asked) == 4:
            raise KeyboardInterrupt
        lost = float(value) > 2
        return tune.Trial(value, epochs, math.nan if lost else float(value), math.nan, 10 * epochs)

    monkeypatch.setattr(tune, "_train", train)
    whole = plan()
    present = toy.config.optimizer.keywords["lr"]
    with pytest.raises(KeyboardInterrupt):
        tune.tune(whole, tmp_path, CPU)
    trials = tune.tune(whole, tmp_path, CPU)
    assert asked[0][0] == f"{present / 2:g}" and float(asked[2][0]) == pytest.approx(present)
    assert asked.count(asked[3]) == 2 and all(asked.count(x) == 1 for x in asked if x != asked[3])
    best = tune.best(trials)
    assert not math.isnan(best.score) and best.epochs == whole.longest
    assert any(float(t.value) > float(best.value) for t in trials) or len({t.value for t in trials}) == 13
    with pytest.raises(UserError, match="every trial ended with NaN"):
        tune.best([tune.Trial("1", 1, math.nan, math.nan, 1)])


def test_the_cost_is_in_whole_runs() -> None:
    """Of the config as it stands, on all of its training data. Kills: a cost in runs that hold a share out."""
    held = tune.Plan(toy.config, "toy", "optimizer.lr", held_out=0.2)
    epochs = held.longest
    trials = [tune.Trial("0.1", epochs, 0.5, 0.1, 8 * epochs)]
    whole = 10 * toy.config.epochs
    assert tune.cost(held, trials) == (
        f"1 short runs, {8 * epochs} forward-backward passes: {8 * epochs / whole:.1f} times those of the whole run"
    )


def test_a_lost_run_is_no_end(tmp_path: Path) -> None:
    """A value at which training is lost has its line, and the search goes on. Kills: an exit where one value fails."""
    trials = tune.tune(plan(("1e30", "0.01")), tmp_path, CPU)
    assert {t.value for t in trials} == {"1e30", "0.01"}
    assert tune.best(trials).value == "0.01"


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"trials": [5], "plan": {}}', "[" * 100_000,
     '{"trials": [{"value": 1, "epochs": "x", "score": "y", "loss": 0, "passes": 0}], "plan": {}}'],
)  # fmt: skip
def test_a_record_of_anybodys(content: str, tmp_path: Path) -> None:
    """Kills: a traceback out of a file that was changed by hand."""
    (tmp_path / tune.RECORD).write_text(content)
    with pytest.raises(UserError, match="not written by this tool"):
        tune.tune(plan(), tmp_path, CPU)
