"""The bare loop that the training loop's cost is measured against."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.compare.memory_task import configured
from benchmarks.speed.loop_cost import bare
from tasks import engine
from tests.benchmarks.compare.toy import TOY, data


def test_the_bare_loop_takes_the_same_steps() -> None:
    """To the bit. Kills: a comparison with less work, another order of the batches or another schedule."""
    for name, settings in (("base", {}), ("budget-1.2", {"rho": 0.1})):
        config: Any = configured(TOY, TOY.row(name), data(0), 0, settings, 0.2)
        model = bare(config)
        built: list[torch.nn.Module] = []
        build = config.task.build
        config.task.build = lambda build=build, built=built: built.append(build()) or built[-1]
        engine.train(config, None, device=torch.device("cpu"), name=name)
        for (key, ours), theirs in zip(built[0].state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), key
