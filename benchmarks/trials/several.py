"""Muon and AdamW under one ARSAM, on a small vision transformer: python -m benchmarks.trials.several, minutes on one core.

scikit-learn's digits with 40 % wrong labels, as in the study. Muon has the matrices of the blocks, AdamW all else. Each method
chooses its rho on held-out images of a seed of their own, whose labels are as noisy.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from arsam import ARSAM
from benchmarks.compare import workloads
from benchmarks.trials import cases

RHOS, SEEDS, TUNING, EPOCHS, BATCH = (0.1, 0.3), range(3), 1000, 12, 64
PASSES = {"SAM": 2.0, "ARSAM, passes=1.2": 1.2}


def bases(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("blocks")]
    return [Muon(matrices, lr=0.02), AdamW(others, lr=2e-3, weight_decay=0.01)]


def accuracy(method: str, rho: float | None, seed: int, split: str) -> dict[str, float]:
    """A run's share of right answers."""
    data = workloads.digits(seed)
    images, labels = data["train"]
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4)
    pair = bases(model)
    total = len(images) // BATCH * EPOCHS
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(base, total) for base in pair]
    optimizer = None if rho is None else ARSAM(pair, model, rho=rho, passes=PASSES[method])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator)[: total // EPOCHS * BATCH].split(BATCH):

            def closure(batch: Tensor = batch) -> Tensor:
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                return loss

            if optimizer is None:
                closure()
                for base in pair:
                    base.step()
            else:
                optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step()
    model.eval()
    with torch.no_grad():
        right, count = zip(
            *(_right(model, x, y) for x, y in zip(*(part.split(300) for part in data[split]), strict=True)), strict=True
        )
    passes = 1.0 if optimizer is None else optimizer.stats["passes_per_step"]
    return {"accuracy": round(sum(right) / sum(count), 4), "passes_per_step": round(passes, 3)}


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int]:
    return int((model(images).argmax(1) == labels).sum()), len(labels)


def main() -> None:
    """Measure what has not been measured."""
    tuning = [{"method": m, "rho": r, "seed": TUNING, "split": "val"} for r, m in itertools.product(RHOS, PASSES)]
    cases.measure("several", tuning, accuracy)
    chosen = {m: _best(m) for m in PASSES}
    tests: list[dict[str, Any]] = [{"method": "Muon and AdamW", "rho": None, "seed": s, "split": "test"} for s in SEEDS]
    tests += [{"method": m, "rho": rho, "seed": s, "split": "test"} for s in SEEDS for m, rho in chosen.items()]
    cases.measure("several", tests, accuracy)


def _best(method: str) -> float:
    lines = [line for line in cases.read("several") if line["method"] == method and line["split"] == "val"]
    return max(lines, key=lambda line: line["accuracy"])["rho"]


def table() -> str:
    """Test accuracy in percent, mean and standard deviation over the seeds."""
    rows = ["| method | rho | passes per step | test accuracy |", "| --- | --- | --- | --- |"]
    lines = [line for line in cases.read("several") if line["split"] == "test"]
    for method in ("Muon and AdamW", *PASSES):
        own = [line for line in lines if line["method"] == method]
        if own:
            passes = statistics.fmean(line["passes_per_step"] for line in own)
            figures = cases.cell([line["accuracy"] for line in own], 100)
            rows.append(f"| {method} | {own[0]['rho'] or ''} | {passes:.2f} | {figures} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
