"""Dropout under sharpness-aware minimization: python -m benchmarks.trials.dropout, two minutes on one core.

Handwritten digits with 40 % wrong labels, a network of three layers with dropout between them. The two passes of an ascent
draw the same masks; the last row lets them draw apart, so that a kept PSF is mostly the difference of two masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from arsam import ARSAM, reuse, sampling
from benchmarks.trials import cases

DROPOUT, SEEDS, EPOCHS, BATCH, NOISE, RHO = (0.0, 0.1, 0.3, 0.5), range(3), 20, 50, 0.4, 0.05
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=2e-3, weight_decay=1e-2),
}
METHODS: dict[str, Callable[[Optimizer, nn.Module], Optimizer]] = {
    "base": lambda base, model: base,
    "SAM": lambda base, model: ARSAM(base, model, rho=RHO, sampling=sampling.Always(), reuse=reuse.Nothing()),
    "ARSAM": lambda base, model: ARSAM(base, model, rho=RHO),
    "ARSAM, masks drawn apart": lambda base, model: ARSAM(base, model, rho=RHO, same_randomness=False),
}


def accuracy(base: str, method: str, dropout: float, seed: int) -> float:
    """Share of the test images that are told right, after training."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test, given = order[:1000], order[1000:], labels.clone()
    wrong = torch.rand(len(labels), generator=generator) < NOISE
    given[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = METHODS[method](BASES[base](model.parameters()), model)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train), generator=generator).split(BATCH):

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[train[batch]]), given[train[batch]])
                loss.backward()
                return loss

            optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
    model.eval()
    return float((model(images[test]).argmax(1) == labels[test]).float().mean())


def main() -> None:
    """Measure what has not been measured."""
    every = itertools.product(BASES, METHODS, DROPOUT, SEEDS)
    runs = [{"base": b, "method": m, "dropout": p, "seed": s} for b, m, p, s in every]
    cases.measure("dropout", runs, lambda **case: {"accuracy": round(accuracy(**case), 4)})


def table() -> str:
    """Accuracy in percent, mean and standard deviation over the seeds."""
    lines = cases.read("dropout")
    rows = [f"| base optimizer | method |{''.join(f' dropout {p:g} |' for p in DROPOUT)}", f"|{' --- |' * (2 + len(DROPOUT))}"]
    for base, method in itertools.product(BASES, METHODS):
        own = [line for line in lines if line["base"] == base and line["method"] == method]
        found = [[line["accuracy"] for line in own if line["dropout"] == p] for p in DROPOUT]
        rows.append(f"| {base} | {method} |{''.join(f' {cases.cell(x, 100)} |' for x in found)}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
