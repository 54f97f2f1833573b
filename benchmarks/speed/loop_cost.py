"""What the training loop costs over a bare one: the same steps on digits, written as a loop of a dozen lines."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare.memory_task import configured
from benchmarks.compare.suites import SUITES
from tasks import engine, log
from tasks.config import Config
from tasks.loading import Batches


def bare(config: Config) -> nn.Module:
    """Train, and return the model."""
    task: Any = config.task
    torch.manual_seed(config.seed)
    data = task.dataset("train")
    batches = Batches(len(data), config.batch_size, config.epochs, config.seed)
    model = task.build().to(memory_format=torch.channels_last).train()
    optimizer: Any = config.optimizer(task.parameters(model))
    if config.sharpness is not None:
        optimizer = config.sharpness(optimizer, model=model)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = torch.zeros((), dtype=torch.float64)
    for step, (_, indices) in enumerate(batches.after(0)):
        batch = data.batch(torch.from_numpy(indices))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * config.schedule(step, batches.total)

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        losses += optimizer.step(closure).detach()
    return model


def loop_cost(device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of the processor for the training loop over those for a bare loop, on digits on one thread.

    Whole runs, their checkpoints in memory included and their evaluation left out, in turn: other work on the machine then
    changes little. What is recorded.
    """
    torch.set_num_threads(1)
    suite: Any = SUITES["digits"]
    found: dict[str, Any] = {}
    for name in ("base", "sam"):
        row = suite.row(name)
        config: Any = configured(suite, row, suite.data(0), 0, {"rho": 0.5} if row.knobs else {})
        config.task.evaluate = lambda *_: {suite.metric: 0.0}
        ratios: list[float] = []
        for _ in range(rounds + 1):
            start = time.process_time()
            bare(config)
            middle = time.process_time()
            engine.train(config, None, device=device, name=name)
            ratios.append((time.process_time() - middle) / (middle - start))
        ratios = sorted(ratios[1:])  # the first round warms up
        quartiles = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        found[name] = {"ratio": statistics.median(ratios), "quartiles": quartiles}
        print(f"{name}: {found[name]['ratio']:.3f} ({quartiles[0]:.3f}-{quartiles[1]:.3f}) of a bare loop's time")
    return {"rows": found, "rounds": rounds, **log.environment(device)}
