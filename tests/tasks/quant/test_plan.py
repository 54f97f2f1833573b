"""What is said before the stages begin: how much there is to do, and about how long it takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import arsam
from arsam import sampling
from configs.quant import resnet18_w4a4_sgd as baseline
from tasks.quant import plan

CONFIG: Any = replace(baseline.sample, epochs=10, eval_every=5, num_workers=0)


def test_times() -> None:
    """Of made-up seconds. Kills: epochs left out, loading counted beside workers that do it meanwhile, a done stage again."""
    config = replace(CONFIG, pretraining=replace(CONFIG.pretraining, epochs=4, eval_every=4))
    train, val = (len(config.task.dataset(split)) for split in ("train", "val"))
    measuring = val * 3.0
    at = plan.Pace(load=1.0, answer=1.0, answer_low=2.0, learn=5.0, learn_low=9.0)
    lines = plan.lines(config, config.task, None, at, set())
    assert f"4 epochs of {train} items" in lines[1]
    assert lines[1].endswith(f"about {plan.duration(4 * train * 6.0 + measuring)}")
    assert lines[3].endswith(f"about {plan.duration(10 * train * 10.0 + 2 * measuring)}")
    lines = plan.lines(replace(config, num_workers=4), config.task, Path("x.pt"), at, {"ptq"})
    assert lines[1] == "  float: weights of x.pt" and lines[2].endswith(": done")
    assert lines[3].endswith(f"about {plan.duration(10 * train * 9.0 + 2 * val * 2.0)}")
    assert "training: none" in plan.lines(replace(config, epochs=0), config.task, Path("x.pt"), at, set())[3]


def test_pace() -> None:
    """Measured, and nothing else moved. Kills: random numbers drawn on the way."""
    before = torch.get_rng_state()
    at = plan.pace(CONFIG, CONFIG.task, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < at.answer < at.learn < 10 and 0 < at.answer_low < at.learn_low < 10 and 0 < at.load < 1


@pytest.mark.parametrize(
    ("sharpness", "expected"),
    [
        (None, 1.0),
        (arsam.ARSAM, 1.2),
        (partial(arsam.ARSAM, rho=0.1), 1.2),
        (partial(arsam.ARSAM, passes=1.5), 1.5),
        (partial(arsam.ARSAM, sampling=sampling.Always()), 2.0),
        (arsam.ARSAM.published, 2.0),
    ],
)
def test_passes(sharpness: Any, expected: float) -> None:
    """Kills: a sharpness-aware training that is to take as long as a plain one."""
    assert plan.passes(replace(CONFIG, sharpness=sharpness)) == expected


def test_durations() -> None:
    """Kills: 5400 s."""
    assert [plan.duration(s) for s in (0.1, 40, 720, 12600)] == ["1 s", "40 s", "12 min", "3.5 h"]
