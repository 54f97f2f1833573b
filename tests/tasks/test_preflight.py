"""What is missing is noticed before the first step."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import preflight, records
from tasks.errors import UserError
from tests.tasks import toy


@dataclasses.dataclass(frozen=True)
class Pictures(toy.Toy):
    """A toy that says what its network takes, and may be given something else."""

    wide: int = 3

    def example(self) -> torch.Tensor:
        """An input."""
        return torch.zeros(1, self.wide)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The toy's."""
        return super().loss(model, {**batch, "x": batch["x"].repeat(1, self.wide // 3)})


def test_a_batch_that_does_not_fit_the_network(tmp_path: Path) -> None:
    """One line, and nothing is left behind. Kills: a traceback at the first step, a folder that is in the way next time."""
    with pytest.raises(UserError, match=r"the network and its data do not fit each other \(x \(3,\), y \(1,\)\): RuntimeError"):
        toy.run(tmp_path / "run", task=Pictures(wide=6))
    assert not (tmp_path / "run").exists()


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Kills: statistics, random numbers or a teacher that the trial batch moves."""
    toy.run(tmp_path / "a", task=Pictures(), epochs=1)
    toy.run(tmp_path / "b", epochs=1)
    a, b = (toy.weights(tmp_path / name) for name in "ab")
    toy.assert_same({**a, "config": 0}, {**b, "config": 0})


class NoVal(toy.Toy):
    """Lacks its val split."""

    def dataset(self, split: str) -> toy.Points:
        """Points, or none."""
        return toy.Points(21 if split == "train" else 0)


def test_both_splits_are_looked_at(tmp_path: Path) -> None:
    """Kills: an empty split that is noticed after the epochs."""
    with pytest.raises(UserError, match="the val split holds nothing"):
        toy.run(tmp_path / "run", task=NoVal())
    with pytest.raises(UserError, match="the train split holds nothing"):
        toy.run(tmp_path / "run", task=toy.Toy(count=0))


def test_room_for_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a bus error in a container with 64 MB of shared memory."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=4, f_frsize=20))
    with pytest.raises(UserError, match=r"num_workers=2: the loader processes need up to 0 MB of shared memory, and /dev/shm"):
        toy.run(tmp_path / "run", num_workers=2)
    config = dataclasses.replace(toy.config, num_workers=0)
    preflight.check(config, config.task.dataset("train"), config.task.build(), toy.CPU)


def test_a_missing_logger_is_noticed_first(tmp_path: Path) -> None:
    """By name. Kills: an error after the first epoch."""
    config = dataclasses.replace(toy.config)
    object.__setattr__(config, "log_to", "no_such_logger")
    with pytest.raises(UserError, match="log_to: needs the package no_such_logger, which is not installed"):
        records.loggers.check("no_such_logger")
