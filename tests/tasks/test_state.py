"""What a run changes: how it is built, and that a checkpoint has all of it."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from arsam import ARSAM, reuse, sampling
from tasks import state
from tasks.loading import Batches
from tasks.step import floats
from tests.tasks import toy


def test_total_steps_reach_the_rules() -> None:
    """Tail and GradientNorm are given the run's length, warm-ups in epochs become steps, reuse is built."""
    for rule in (partial(sampling.Tail, 0.2), partial(sampling.GradientNorm, 1, -1)):
        config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, sampling=rule))  # type: ignore[arg-type]
        optimizer = state.build_optimizer(config, config.task.build(), 7)
        assert optimizer.sampling.total_steps == 35  # type: ignore[attr-defined]
    optimizer = state.build_optimizer(toy.config, toy.config.task.build(), 7)
    assert optimizer.sampling.warmup == 7  # type: ignore[attr-defined]
    config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, reuse=partial(reuse.Decayed, horizon=9)))  # type: ignore[arg-type]
    assert state.build_optimizer(config, config.task.build(), 7).reuse.horizon == 9  # type: ignore[attr-defined]


def test_what_is_saved_is_not_copied() -> None:
    """Kills: a state_dict that doubles the memory of model, average and optimizer."""
    config = dataclasses.replace(toy.config, ema=0.9, num_workers=0)
    batches = Batches(21, 4, 5, 0)
    run = state.State(config, batches, toy.CPU)
    data = config.task.dataset("train")
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    for _ in range(2):
        run.optimizer.step(lambda: (run.optimizer.zero_grad(), config.task.loss(run.model, batch).backward())[1])
    first, second = ([x for x in floats(run.state_dict()) if x.numel() > 1] for _ in range(2))
    assert len(first) > 25
    assert [x.untyped_storage().data_ptr() for x in first] == [x.untyped_storage().data_ptr() for x in second]


def test_average_equals_torchs() -> None:
    """To the bit, statistics and counts too. Kills: a first update that mixes, statistics that are left out."""
    torch.manual_seed(0)
    model = toy.config.task.build()
    ours = state.Average(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3))
        ours.update(model)
        theirs.update_parameters(model)
    toy.assert_same(dict(ours.module.state_dict()), dict(theirs.module.state_dict()))
    assert isinstance(ours.module, nn.Module)
    assert ours.count == 4
