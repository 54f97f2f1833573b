"""The loop: resume, order, records, clipping, averaging, and the same loop for every optimizer."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks import checkpoint, engine, loading, log, schedule
from tasks.config import describe
from tasks.errors import UserError
from tests.tasks import toy

CPU = torch.device("cpu")
FILES = {"run.json", "metrics.jsonl", "last.pt", "best.pt", "result.json", "curves.png"}


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def test_files_and_result(tmp_path: Path) -> None:
    """Every file and field of the contract."""
    result = toy.run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result) == {
        "task", "metrics", "steps", "ascents", "passes_per_step", "train_seconds", "images_per_second", "peak_memory_mb",
        "seed", "config",
    }  # fmt: skip
    assert result["steps"] == 25
    assert result["passes_per_step"] == 1 + result["ascents"] / 25
    assert result["ascents"] >= 5 + 3, "an epoch of warm-up, and the quota of the windows"
    assert result["peak_memory_mb"] > 10
    record = json.loads((tmp_path / "run.json").read_text())
    assert {"config", "versions", "commit", "device", "command"} <= record.keys()
    assert record["config"]["sharpness"]["sampling"]["warmup"] == "Epochs(1)"
    lines = log.read(tmp_path / "metrics.jsonl")
    assert [(line["epoch"], "loss" in line) for line in lines] == [(e, loss) for e in range(1, 6) for loss in (True, False)]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_same_seed_same_run_whatever_the_workers(tmp_path: Path) -> None:
    """Augmentation follows (seed, epoch, index). Kills: randomness that depends on the process that loads."""
    for name, changes in (("a", {}), ("b", {"num_workers": 2}), ("c", {"seed": 1})):
        toy.run(tmp_path / name, **changes)
    a, b, c = (toy.weights(tmp_path / name)["model"] for name in "abc")
    toy.assert_same(a, b)
    assert not torch.equal(a["0.weight"], c["0.weight"])


@pytest.mark.parametrize("changes", [{}, {"sharpness": None, "ema": 0.9, "clip_norm": 0.5}], ids=["arsam", "baseline"])
@pytest.mark.parametrize("stop", [7, 10])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path: Path, stop: int, changes: dict[str, Any]) -> None:
    """In the midst of an epoch and at its end. Kills: order, noise, schedule, EMA, loss sum or RNG not restored."""
    expected = toy.run(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "cut", task=Interrupting(stop), **changes)
    assert toy.weights(tmp_path / "cut")["progress"]["step"] == stop
    saved = toy.weights(tmp_path / "cut")
    saved["config"]["task"] = describe(toy.config.task)
    checkpoint.save(tmp_path / "cut" / "last.pt", saved)
    result = toy.run(tmp_path / "cut", resume=True, **changes)
    for name in ("last.pt", "best.pt"):
        a, b = toy.weights(tmp_path / "whole", name), toy.weights(tmp_path / "cut", name)
        toy.assert_same({**a, "config": 0}, {**b, "config": 0})
    timing = {"train_seconds", "images_per_second", "peak_memory_mb"}
    assert {k: v for k, v in result.items() if k not in timing} == {k: v for k, v in expected.items() if k not in timing}
    lines = [untimed(log.read(tmp_path / name / "metrics.jsonl")) for name in ("whole", "cut")]
    assert lines[0] == lines[1]


class Interrupting(toy.Toy):
    """Sends SIGINT to its own process in the first pass of a step."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "seen", [])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The toy's, and the signal."""
        seen: list[float] = self.__dict__["seen"]
        if (number := float(batch["x"][0, 0])) not in seen:
            seen.append(number)
            if len(seen) == self.__dict__["stop"]:
                os.kill(os.getpid(), signal.SIGINT)
        return super().loss(model, batch)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """The result is written again, the same."""
    first = toy.run(tmp_path)
    before = toy.weights(tmp_path)
    again = toy.run(tmp_path, resume=True)
    toy.assert_same(before, toy.weights(tmp_path))
    assert again["metrics"] == first["metrics"]


def test_resume_with_another_config(tmp_path: Path) -> None:
    """Refused, with what differs; the number of workers may differ."""
    toy.run(tmp_path, epochs=1)
    toy.run(tmp_path, epochs=1, num_workers=1, resume=True)
    with pytest.raises(UserError, match=r"last\.pt: made with another config: batch_size was 4, is 5"):
        toy.run(tmp_path, epochs=1, batch_size=5, resume=True)
    with pytest.raises(UserError, match="no such checkpoint"):
        toy.run(tmp_path / "nowhere", resume=True)


def test_a_run_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The same figures; nothing on the disk and nothing on the terminal."""
    expected = toy.run(tmp_path / "run")
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    found = toy.run(None)
    assert {k: found[k] for k in ("metrics", "steps", "ascents")} == {k: expected[k] for k in ("metrics", "steps", "ascents")}
    assert capfd.readouterr() == ("", "")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_the_baseline_is_torch_alone(tmp_path: Path) -> None:
    """The loop adds nothing: a few lines of plain torch give the same weights. Kills: an extra step, a shifted schedule."""
    config = dataclasses.replace(toy.config, sharpness=None, epochs=2)
    engine.train(config, tmp_path, device=CPU)
    torch.manual_seed(config.seed)
    data, batches = loading.Seeded(config.task.dataset("train"), 0), loading.Batches(21, 4, 2, 0)
    model = config.task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (epoch, indices) in enumerate(batches.after(0)):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule.cosine(step, 10, warmup=5)
        batch = torch.utils.data.default_collate([data[epoch, i] for i in indices])
        optimizer.zero_grad()
        config.task.loss(model, batch).backward()
        optimizer.step()
    toy.assert_same(dict(toy.weights(tmp_path)["model"]), dict(model.state_dict()))


def test_average_is_what_is_evaluated(tmp_path: Path) -> None:
    """EMA weights are saved, evaluated, and preferred when a checkpoint is loaded."""
    result = toy.run(tmp_path, ema=0.5, epochs=2)
    saved = toy.weights(tmp_path)
    assert not torch.equal(saved["average"]["0.weight"], saved["model"]["0.weight"])
    model = toy.config.task.build()
    checkpoint.load_weights(model, tmp_path / "last.pt")
    assert torch.equal(model[0].weight, saved["average"]["0.weight"])  # type: ignore[index]
    assert engine.evaluate(toy.config, model, CPU) == result["metrics"]


def test_evaluation_every_n_epochs(tmp_path: Path) -> None:
    """And at the end."""
    toy.run(tmp_path, eval_every=3)
    assert [line["epoch"] for line in log.read(tmp_path / "metrics.jsonl") if "metrics" in line] == [3, 5]


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Torn(toy.Toy):
    """One of its items cannot be read."""

    def dataset(self, split: str) -> Any:
        """The toy's, and a hole."""
        points = super().dataset(split)

        class Holed(toy.Points):
            def __getitem__(self, index: int) -> dict[str, Tensor]:
                if split == "train" and index == max(toy.keys(3))[1]:
                    raise UserError("no such picture")
                return super().__getitem__(index)

        return Holed(points.count)


def test_steps_before_an_item_that_cannot_be_read_are_kept(tmp_path: Path) -> None:
    """Kills: an error that costs the steps since the last epoch's end."""
    with pytest.raises(UserError, match="no such picture"):
        toy.run(tmp_path, task=Torn(), epochs=2)
    assert toy.weights(tmp_path)["progress"]["step"] == 3
