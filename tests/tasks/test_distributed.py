"""torchrun with two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import checkpoint, log

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from tasks import distributed, engine
from tests.tasks import toy

distributed.start()
out = Path(sys.argv[1])
for name, changes in json.loads(sys.argv[2]).items():
    task = toy.Toy(**changes.pop("task"))
    run = lambda resume=False: engine.train(
        replace(toy.config, task=task, **changes), out / name, device=torch.device("cpu"), resume=resume
    )
    found = [run(), run(resume=True)["metrics"]]
    if distributed.world() > 1:
        (out / f"{name}{distributed.rank()}.json").write_text(json.dumps(found))
distributed.stop()
"""
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"task": {"norm": False, "dropout": 0.0}},
    "parts": {"task": {"norm": False, "dropout": 0.0}, "accumulate": 2, "ema": 0.9, "clip_norm": 0.5},
    "norm": {"task": {}, "epochs": 2},
}


def processes(count: int, *command: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    done = processes(2, str(folder / "script.py"), str(folder), json.dumps(RUNS))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["plain", "parts"])
def test_two_processes_equal_one(out: Path, tmp_path: Path, name: str) -> None:
    """Kills: batches not dealt out, gradients summed, an average of another model, two writers of one file."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path), json.dumps({name: RUNS[name]})],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (checkpoint.load(folder / name / "last.pt") for folder in (tmp_path, out))
    torch.testing.assert_close(two["model"], one["model"], atol=1e-6, rtol=0)
    assert two["progress"]["passes"] == one["progress"]["passes"] > one["progress"]["step"]
    epochs = [[line["loss"] for line in log.read(f / name / "metrics.jsonl") if "loss" in line] for f in (tmp_path, out)]
    assert epochs[1] == pytest.approx(epochs[0], abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_processes_agree(out: Path, name: str) -> None:
    """Same metrics on both ranks, resumed too. Kills: a metric of one share, running statistics of one's own."""
    first, second = (json.loads((out / f"{name}{rank}.json").read_text()) for rank in range(2))
    assert first[0]["metrics"] == second[0]["metrics"] == first[1] == second[1]


def test_tool_in_two_processes(tmp_path: Path) -> None:
    """The user's command. Kills: two run folders, a batch that cannot be dealt out evenly, a report from each process."""
    command = ["tools/train.py", "tests/tasks/toy.py", "--device", "cpu", "--sample"]
    done = processes(2, *command, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passes per step") == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"last.pt", "result.json", "curves.png"}
    done = processes(2, *command, "batch_size=3", "--out", str(tmp_path / "odd"))
    assert done.returncode != 0
    assert "batch_size: the 3 items of a step cannot be dealt out evenly to 2 processes" in done.stderr
