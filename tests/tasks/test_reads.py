"""How often a step makes the host wait for the device: counted on the CPU, where a read is the same call."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from arsam import ARSAM, reuse, sampling
from tasks.loading import Batches, Seeded
from tasks.state import State
from tasks.step import Step
from tests.tasks import toy

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}
BUDGET = partial(ARSAM, rho=0.1, sampling=partial(sampling.Periodic, 2), reuse=partial(reuse.Decayed))  # type: ignore[arg-type]


class Counted(TorchDispatchMode):
    """Counts the calls that bring a number from a tensor to Python, and the norms of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.norms = self.clones = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in READS
        self.norms += "norm" in func.name() and "batch_norm" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sharpness", [None, BUDGET], ids=["baseline", "arsam"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 0), ("bf16", 0), ("fp16", 1)])
def test_reads_of_a_step(precision: Any, most: int, sharpness: Any) -> None:
    """With clipping and an average. Kills: a check of each pass, a loss or a scale that is read, an average that counts."""
    config = dataclasses.replace(
        toy.config, precision=precision, sharpness=sharpness, optimizer=partial(SGD, lr=1e-2), ema=0.9, clip_norm=1.0
    )
    torch.manual_seed(0)
    data, batches = Seeded(config.task.dataset("train"), 0), Batches(21, 4, 5, 0)
    state = State(config, batches, toy.CPU)
    step = Step(config, state)
    state.trained.train()
    steps = 0
    for keys in batches.after(0):
        batch = torch.utils.data.default_collate([data[key] for key in keys])
        state.set_rate()
        passes = state.progress.passes
        with Counted() as counted:
            step(batch)
        passes = state.progress.passes - passes
        assert counted.reads <= most, f"step {steps}: {counted.reads} reads"
        # one of each pass at most (of the direction of e, or under a loss scale), and that of the update, for clipping
        assert counted.norms <= passes + 1
        steps += 1
    assert steps == 25
    assert state.progress.passes > 25 or sharpness is None
