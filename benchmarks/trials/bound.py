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

BOUNDS: list[dict[str, float | None]] = [
    {"max_ratio": None},
    {"max_ratio": None, "max_growth": 2.0},
    {"max_ratio": None, "max_growth": 4.0},
    {"max_ratio": 2.0},
    {"max_ratio": 1.0},
    {"max_ratio": 0.5},
]
# suite -> rho, that of the records where they have one; seeds
RHOS = {"digits": (0.7071, 3), "digits-dropout": (0.25, 5), "cifar16-clean": (0.5, 1), "cifar16-w4a4": (2.0, 1)}


class Noting(Decayed):
    """Decayed("auto", None) that notes ||beta^j PSF|| / ||g||, before the bound."""

    def __init__(self, max_ratio: float | None, max_growth: float | None = None) -> None:
        super().__init__("auto", None, max_ratio=max_ratio, max_growth=max_growth)
        self._noted: list[Tensor] = []

    def mix_(self, gradients: list[Tensor], kept: list[Tensor], age: int, spacing: Any = None, size: Any = None) -> None:
        """As Decayed's."""
        assert size is not None
        self._noted.append(self.decay(spacing) ** age * size / functional.global_norm(gradients))
        super().mix_(gradients, kept, age, spacing, size)

    def noted(self) -> Tensor:
        """The ratios, one of each step that reused."""
        return torch.stack(self._noted)


def accuracy(suite: str, passes: float, max_ratio: float | None, seed: int, max_growth: float | None = None) -> dict[str, Any]:
    """A run of a suite with these bounds."""
    workload, rho = SUITES[suite], RHOS[suite][0]
    assert isinstance(workload, Suite)
    rule = Noting(max_ratio, max_growth)

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
        "not_served": round(1 - len(ratios) / (found["steps"] - found["ascents"]), 4),
        "bound": None if max_ratio is None else round(float((ratios > max_ratio).float().mean()), 4),
    }


def outlier(optimizer: str, max_ratio: float | None, seed: int, max_growth: float | None = None) -> dict[str, Any]:
    """Mean training loss of the 19 steps after a broken batch on the ascent of step 200, and without that batch."""
    rules: dict[str, Any] = {"passes": 2} if optimizer == "SAM" else {"passes": 1.05, "reuse": Noting(max_ratio, max_growth)}
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
    seeds = [{"optimizer": "ARSAM", **bound, "seed": s} for bound in BOUNDS for s in range(5)]
    cases.measure("outlier", [{"optimizer": "SAM", "max_ratio": None, "seed": s} for s in range(5)] + seeds, outlier)
    for name in sys.argv[1:] or RHOS:
        runs = itertools.product(range(RHOS[name][1]), (1.2, 1.05), BOUNDS)
        cases.measure("bound", [{"suite": name, "passes": p, **bound, "seed": s} for s, p, bound in runs], accuracy)


def _named(bound: dict[str, float | None]) -> str:
    given = [f"`{name}={value:g}`" for name, value in bound.items() if value is not None]
    return given[0] if given else "no bound"


def _of(lines: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    fields = {"max_growth": None, **fields}
    return [line for line in lines if all(line.get(name) == value for name, value in fields.items())]


def table() -> str:
    """Test accuracy in percent for each bound, on how many steps it was reached, and the ratio without one."""
    rows = [
        "| workload | passes | seeds | bound | test accuracy | reached | ratio: median, 99 %, largest |",
        f"|{' --- |' * 7}",
    ]
    lines = cases.read("bound")
    for suite, passes, bound in itertools.product(RHOS, (1.2, 1.05), BOUNDS):
        own = _of(lines, suite=suite, passes=passes, **bound)
        if own:
            figures = cases.cell([line["accuracy"] for line in own], 100)
            name = "not_served" if bound.get("max_growth") else "bound"
            reached = f"{100 * statistics.fmean(line[name] for line in own):.0f} %" if _named(bound) != "no bound" else ""
            ratios = torch.tensor([line["quantiles"] for line in own]).mean(0)
            shown = "" if reached else f"{ratios[0]:.2g}, {ratios[2]:.2g}, {ratios[3]:.2g}"
            rows.append(f"| {suite} | {passes:g} | {len(own)} | {_named(bound)} | {figures} | {reached} | {shown} |")
    return "\n".join(rows)


def table_of_outliers() -> str:
    """The training loss after a broken batch, and without it."""
    rows = ["| | without the broken batch | after it |", "| --- | --- | --- |"]
    lines = cases.read("outlier")
    named = [("SAM", "SAM", BOUNDS[0]), *((f"`passes=1.05`, {_named(bound)}", "ARSAM", bound) for bound in BOUNDS)]
    for name, optimizer, bound in named:
        own = _of(lines, optimizer=optimizer, **bound)
        if own:
            figures = [cases.cell([line[key] for line in own], 1, 2) for key in ("loss", "loss_after_outlier")]
            rows.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
