"""Where the lines of metrics.jsonl go besides."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import engine, log, loggers
from tasks.errors import UserError
from tests.tasks.toy import CPU, config

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from tasks import engine
from tests.tasks.toy import CPU, config
run = replace(config, log_to=sys.argv[1])
for epochs, resume in ((1, False), (2, True)):
    engine.train(replace(run, epochs=epochs), Path("run"), device=CPU, resume=resume)
"""


def logged(kind: str, place: Path) -> set[tuple[str, int]]:
    """What a real package has kept: names and steps."""
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(place / "run"))
        events.Reload()
        return {(name, event.step) for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    if kind == "mlflow":
        files = place.glob("mlruns/*/*/metrics/*")
        return {(file.name, int(line.split()[2])) for file in files for line in file.read_text().splitlines()}
    runs = list(place.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2  # the run, and its going on
    return {
        (name, 5 * step) for step, run in enumerate(runs, 1) for name in ("loss", "score") if name.encode() in run.read_bytes()
    }


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_installed(kind: str, tmp_path: Path) -> None:
    """Offline, in a run that goes on. Kills: a logger that is never closed, one whose numbers arrive without their steps."""
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed: pip install {kind}")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", RUN, kind], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not logged" not in done.stderr
    assert {("loss", 5), ("score", 5), ("loss", 10), ("score", 10)} <= logged(kind, tmp_path)


def given(monkeypatch: pytest.MonkeyPatch, **acts: Any) -> list[Any]:
    """A stand-in for wandb; what was logged."""
    seen: list[Any] = []
    run = SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("end"))
    module = SimpleNamespace(init=lambda **_: SimpleNamespace(**{**vars(run), **acts}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def fail(*_: Any, **__: Any) -> None:
    """What a service that is away does."""
    raise ConnectionError("nobody\nthere")


def test_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: texts, inf and nested metrics handed on, a run that is not closed."""
    seen = given(monkeypatch)
    engine.train(dataclasses.replace(config, log_to="wandb", epochs=1), tmp_path, device=CPU)
    lines = log.read(tmp_path / "metrics.jsonl")
    assert [step for step, _ in seen[:-1]] == [line["step"] for line in lines] and seen[-1] == "end"
    assert seen[1][1] == {"epoch": 1.0, "score": lines[1]["metrics"]["score"]}
    assert loggers.numbers({"step": 3, "a": float("inf"), "b": "text", "c": None, "d": 1}) == {"d": 1.0}


@pytest.mark.parametrize("act", ["log", "finish"])
def test_a_service_that_goes_away(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs no training. Kills: a traceback hours later, at the end too."""
    given(monkeypatch, **{act: fail})
    result = engine.train(dataclasses.replace(config, log_to="wandb", epochs=1), tmp_path, device=CPU)
    assert result["steps"] == 5
    assert "warning: log_to=wandb: not logged (ConnectionError nobody there); the run goes on" in capsys.readouterr().err


def test_a_service_that_is_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step, with the way out; nothing is left. Kills: a traceback out of a package of others."""
    given(monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match=r"log_to=wandb: cannot be started \(ConnectionError nobody there\); `wandb login`"):
        engine.train(dataclasses.replace(config, log_to="wandb"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
