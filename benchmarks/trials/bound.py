"""Which multiple of the norm of g shall bound a reused PSF: python -m benchmarks.trials.bound [SUITE ...].

First an outlier: one broken batch, its pictures four times too bright, falls on an ascent. Its PSF is replayed on every
step until the next ascent, so that the training loss of the steps after it says what the bound is worth. Then the suites of the
study: the accuracy with each bound, and how ||beta^j PSF|| / ||g|| is distributed over a run, for a bound shall meet outliers
alone.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, functional
from arsam.reuse import Decayed
from benchmarks.compare import study, workloads
from benchmarks.compare.schema import Row, Setup, Sharpen, Suite
from benchmarks.compare.suites import SUITES
from benchmarks.trials import cases

BOUNDS: tuple[float | None, ...] = (None, 1.0, 2.0, 0.5)
# suite -> rho, that of the records where they have one; seeds
RHOS = {"digits": (0.7071, 5), "digits-dropout": (0.25, 5), "cifar16-clean": (0.5, 2), "cifar16-w4a4": (2.0, 2)}


class Noting(Decayed):
    """Decayed("auto", None) that notes ||beta^j PSF|| / ||g||, before the bound."""

    def __init__(self, max_ratio: float | None) -> None:
        super().__init__("auto", None, max_ratio=max_ratio)
        self._noted: list[Tensor] = []

    def mix_(self, gradients: list[Tensor], kept: list[Tensor], age: int, spacing: Any = None, size: Any = None) -> None:
        """As Decayed's."""
        assert size is not None
        self._noted.append(self.decay(spacing) ** age * size / functional.global_norm(gradients))
        super().mix_(gradients, kept, age, spacing, size)

    def noted(self) -> Tensor:
        """The ratios, one of each step that reused."""
        return torch.stack(self._noted)


def accuracy(suite: str, passes: float, max_ratio: float | None, seed: int) -> dict[str, Any]:
    """A run of a suite with this bound."""
    workload, rho = SUITES[suite], RHOS[suite][0]
    assert isinstance(workload, Suite)
    rule = Noting(max_ratio)

    def sharpen(setup: Setup) -> Sharpen:
        return partial(lambda base, model: ARSAM(base, model, rho=rho, passes=passes, reuse=rule))

    row = Row("bound", "", "arsam", sharpen)
    found = study.run(workload, row, workload.data(seed), seed, {"rho": rho}, 0.0, "test", torch.device("cpu"))
    ratios = rule.noted()
    shares = torch.tensor([0.5, 0.9, 0.99, 1.0])
    return {
        "accuracy": round(found["accuracy"], 4),
        "training_loss": round(found["training_loss"], 4),
        "quantiles": [float(f"{x:.3g}") for x in ratios.quantile(shares)],
        "medians_of_fifths": [float(f"{x.median():.3g}") for x in ratios.chunk(5)],
        "bound": None if max_ratio is None else round(float((ratios > max_ratio).float().mean()), 4),
    }


def outlier(optimizer: str, max_ratio: float | None, seed: int) -> dict[str, Any]:
    """Mean training loss of the 19 steps after a broken batch on the ascent of step 200, and without that batch."""
    rules: dict[str, Any] = {"passes": 2} if optimizer == "SAM" else {"passes": 1.05, "reuse": Noting(max_ratio)}
    return {"loss": _loss(rules, seed, broken=False), "loss_after_outlier": _loss(rules, seed, broken=True)}


def _loss(rules: dict[str, Any], seed: int, broken: bool) -> float:
    images, labels = workloads.digits(seed, noise=0.0)["train"]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = ARSAM(SGD(model.parameters(), lr=0.02, momentum=0.9), model, rho=0.2, **rules)
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for step in range(220):
        batch = torch.randint(len(images), (32,), generator=generator)
        x = images[batch] * (4 if broken and step == 200 else 1)

        def closure(x: Tensor = x, y: Tensor = labels[batch]) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if step > 200:
            with torch.no_grad():
                total += float(nn.functional.cross_entropy(model(images), labels)) / 19
    return round(total, 4)


def main() -> None:
    """Measure what has not been measured."""
    seeds = [{"optimizer": "ARSAM", "max_ratio": r, "seed": s} for r in BOUNDS for s in range(5)]
    cases.measure("outlier", [{"optimizer": "SAM", "max_ratio": None, "seed": s} for s in range(5)] + seeds, outlier)
    for name in sys.argv[1:] or RHOS:
        runs = itertools.product(range(RHOS[name][1]), (1.2, 1.05), BOUNDS)
        cases.measure("bound", [{"suite": name, "passes": p, "max_ratio": r, "seed": s} for s, p, r in runs], accuracy)


def table() -> str:
    """Test accuracy in percent for each bound, and how often it binds."""
    shown = [str(bound) if bound is not None else "none" for bound in BOUNDS]
    rows = [f"| workload | passes | {' | '.join(f'bound {x}' for x in shown)} | ratio: median, 99 %, largest |"]
    rows.append(f"|{' --- |' * (3 + len(BOUNDS))}")
    lines = cases.read("bound")
    for suite, passes in itertools.product(RHOS, (1.2, 1.05)):
        own = [line for line in lines if line["suite"] == suite and line["passes"] == passes]
        if not own:
            continue
        found = [[line for line in own if line["max_ratio"] == bound] for bound in BOUNDS]
        ratios = torch.tensor([line["quantiles"] for line in found[0]]).mean(0)
        figures = [*(_figures(each) for each in found), f"{ratios[0]:.2f}, {ratios[2]:.2f}, {ratios[3]:.2f}"]
        rows.append(f"| {suite}, {len(found[0])} seeds | {passes:g} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _figures(lines: list[dict[str, Any]]) -> str:
    accuracy = cases.cell([line["accuracy"] for line in lines], 100)
    binds = [line["bound"] for line in lines if line["bound"] is not None]
    return f"{accuracy} (binds {100 * statistics.fmean(binds):.0f} %)" if binds else accuracy


def table_of_outliers() -> str:
    """The training loss after a broken batch, and without it."""
    rows = ["| | without the broken batch | after it |", "| --- | --- | --- |"]
    names = [("SAM", None), *(("ARSAM", bound) for bound in BOUNDS)]
    for optimizer, bound in names:
        own = [line for line in cases.read("outlier") if (line["optimizer"], line["max_ratio"]) == (optimizer, bound)]
        name = optimizer if optimizer == "SAM" else f"`passes=1.05`, {f'bound {bound}' if bound else 'no bound'}"
        rows.append(
            f"| {name} |{''.join(f' {cases.cell([x[key] for x in own], 1, 2)} |' for key in ('loss', 'loss_after_outlier'))}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
