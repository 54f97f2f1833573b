"""What a run is asked besides its result: the memory of a step, and how PSFs of different steps resemble each other."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsam import ARSAM
from arsam.reuse import Decayed
from arsam.sampling import Always
from benchmarks.compare.memory_task import configured
from benchmarks.compare.schema import Data, Row, Setup, Sharpen, Suite
from benchmarks.speed.memory import Live
from tasks import engine
from tasks.loading import Batches
from tasks.state import State
from tasks.step import Step


def memory(suite: Suite, row: Row, data: Data, device: torch.device) -> float:
    """Peak megabytes of weights, gradients, states and activations over four steps, with an ascent where a row has some."""
    few = {name: (x[: suite.batch_size], y[: suite.batch_size]) for name, (x, y) in data.items()}
    settings = {**row.settings, **{knob.name: 0.1 for knob in row.knobs}, "rho": 0.1, "epochs": 1.0}
    config = configured(replace(suite, epochs=4), row, few, 0, settings, 0.5)
    config.task.build()  # what it keeps for later calls, such as a trained float network, is not the row's
    batch = config.task.dataset("train").batch(range(len(few["train"][1])))  # type: ignore[attr-defined]
    with Live() as live:
        state = State(config, Batches(len(batch["labels"]), suite.batch_size, 4, 0), device)
        state.trained.train()
        step = Step(config, state)
        for _ in range(4):
            step(batch)
    return live.peak / 1e6


class Observed(ARSAM):
    """ARSAM that shows what it keeps after every step.

    Args:
        base: as of ARSAM, and so the other arguments.
        after: called with (step, PSF as one vector).
    """

    def __init__(self, base: Any, *, after: Any, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.__dict__["after"] = after

    def step(self, closure: Any = None) -> Any:
        """Step, and show."""
        loss = super().step(closure)
        psf = self.state_dict()["arsam"]["kept"].values()
        self.__dict__["after"](self.stats["steps"] - 1, torch.cat([x.flatten() for x in psf]))
        return loss


def ageing(suite: Suite, data: Data, rho: float, device: torch.device, ages: int = 50, probes: int = 6) -> dict[str, Any]:
    """Cosine of a PSF with the PSF of j steps before, on the path of SAM (seed 0), at several times of the training.

    Each is of its own batch, so that the cosine at j = 1 is what is common to two batches, and its fall is what age costs.
    """
    total = len(data["train"][0]) // suite.batch_size * suite.epochs
    probes = min(probes, total // 2)
    ages = min(ages, total // probes - 1)
    starts = [i * total // probes + (total // probes - ages - 1) // 2 for i in range(probes)]
    cosines: list[list[float]] = []
    kept: list[Tensor] = []

    def look(step: int, psf: Tensor) -> None:
        if any(start <= step <= start + ages for start in starts):
            kept.append(psf)
        if step - ages in starts:
            directions = torch.stack([x / x.norm() for x in kept])
            products = directions @ directions.T
            cosines.append([float(products.diagonal(j).mean()) for j in range(1, ages + 1)])
            kept.clear()

    def sharpen(setup: Setup) -> Sharpen:
        return partial(_observed, rho=rho, after=look)

    row = Row("probe", "", "control", sharpen)
    engine.train(configured(suite, row, data, 0, {}), None, device=device, name="ageing")
    mean = [statistics.fmean(values) for values in zip(*cosines, strict=True)]
    return {"rho": rho, "starts": starts, "ages": list(range(1, ages + 1)), "cosine": mean, "cosine_by_start": cosines}


def _observed(base: Any, model: Any, rho: float, after: Any) -> Observed:
    return Observed(base, model=model, rho=rho, sampling=Always(), reuse=Decayed(), after=after)
