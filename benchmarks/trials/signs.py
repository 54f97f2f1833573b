"""What `optimizer.stats` shows where rho is right, far too small and far too large: python -m benchmarks.trials.signs.

Runs of the study's suites, some of them shortened, at multiples of the rho that was chosen there.
"""

from __future__ import annotations

import itertools
import math
import statistics
from functools import partial
from typing import Any

import torch

from arsam import ARSAM
from benchmarks.compare import study
from benchmarks.compare.schema import Row, Setup, Sharpen, Suite
from benchmarks.compare.suites import SUITES
from benchmarks.trials import cases

# suite -> the rho that was chosen for it, share of its epochs
CHOSEN = {"digits": (0.7071, 1.0), "digits-dropout": (0.25, 1.0), "cifar16-clean": (0.5, 0.1)}
MULTIPLES, SEEDS = (0.001, 0.1, 1.0, 4.0), range(2)


class Watched(ARSAM):
    """ARSAM that notes, at every ascent, the loss and what `stats` shows."""

    noted: list[tuple[float, float, float, float]]

    def step(self, closure: Any = None) -> Any:
        """As ARSAM's."""
        before = self.stats["ascents"]
        loss = super().step(closure)
        now = self.stats
        if now["ascents"] > before:
            self.noted.append((float(loss), now["rise"], now["psf_ratio"], now["cosine"]))
        return loss


def signs(suite: str, multiple: float, seed: int) -> dict[str, Any]:
    """A run: its figures, and the quartiles of rise / loss, psf_ratio and cosine in the first fifth of it and over all."""
    workload, (rho, epochs) = SUITES[suite], CHOSEN[suite]
    assert isinstance(workload, Suite)
    noted: list[tuple[float, float, float, float]] = []

    def watched(base: Any, model: Any) -> Watched:
        optimizer = Watched(base, model, rho=multiple * rho)
        optimizer.noted = noted
        return optimizer

    def sharpen(setup: Setup) -> Sharpen:
        return partial(watched)

    settings = {"rho": rho, "epochs": epochs}
    found = study.run(
        workload, Row("signs", "", "arsam", sharpen), workload.data(seed), seed, settings, 0.0, "test", torch.device("cpu")
    )
    figures = torch.tensor([(rise / loss, psf, cosine) for loss, rise, psf, cosine in noted if math.isfinite(loss)])
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    parts = {"first fifth": figures[: len(figures) // 5], "all": figures}
    return {
        "accuracy": round(found["accuracy"], 4),
        "training_loss": round(found["training_loss"], 4),
        **{
            part: {
                name: [float(f"{x:.3g}") for x in rows[:, place].quantile(quartiles)]
                for place, name in enumerate(("rise / loss", "psf_ratio", "cosine"))
            }
            for part, rows in parts.items()
        },
    }


def main() -> None:
    """Measure what has not been measured."""
    every = itertools.product(SEEDS, CHOSEN, MULTIPLES)
    cases.measure("signs", [{"suite": suite, "multiple": m, "seed": s} for s, suite, m in every], signs)


def table() -> str:
    """Medians over a run's ascents, mean over the seeds: of all of them and, in brackets, of the first fifth."""
    rows = ["| workload | rho | test accuracy | rise / loss | psf_ratio | cosine |", f"|{' --- |' * 6}"]
    lines = cases.read("signs")
    for suite, multiple in itertools.product(CHOSEN, MULTIPLES):
        own = [line for line in lines if line["suite"] == suite and line["multiple"] == multiple]
        if not own:
            continue
        cells = [f"{_median(own, 'all', name)} ({_median(own, 'first fifth', name)})" for name in own[0]["all"]]
        accuracy = cases.cell([line["accuracy"] for line in own], 100)
        rows.append(f"| {suite} | {multiple:g} times the chosen | {accuracy} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _median(lines: list[dict[str, Any]], part: str, name: str) -> str:
    return f"{statistics.fmean(line[part][name][1] for line in lines):.2g}"


if __name__ == "__main__":
    main()
