"""Muon and AdamW under one ARSAM, on a small vision transformer: python -m benchmarks.trials.several, minutes on one core.

scikit-learn's digits, 600 to train on, with right labels. Muon has the matrices of the blocks, AdamW all else. rho is the
default: nothing was searched for.
"""

from __future__ import annotations

import statistics

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from arsam import ARSAM
from benchmarks.compare import workloads
from benchmarks.trials import cases

SEEDS, EPOCHS, BATCH = range(3), 16, 64
PASSES = {"Muon and AdamW": 1.0, "SAM": 2.0, "ARSAM, `passes=1.2`": 1.2}


def bases(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("blocks")]
    return [Muon(matrices, lr=0.02), AdamW(others, lr=2e-3, weight_decay=0.01)]


def accuracy(method: str, seed: int) -> dict[str, float]:
    """A run's share of right answers on the test images."""
    data = workloads.digits(seed, noise=0.0)
    images, labels = data["train"]
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4)
    pair = bases(model)
    total = len(images) // BATCH * EPOCHS
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(base, total) for base in pair]
    optimizer = None if method == "Muon and AdamW" else ARSAM(pair, model, passes=PASSES[method])
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
            *(_right(model, x, y) for x, y in zip(*(part.split(300) for part in data["test"]), strict=True)), strict=True
        )
    passes = 1.0 if optimizer is None else optimizer.stats["passes_per_step"]
    return {"accuracy": round(sum(right) / sum(count), 4), "passes_per_step": round(passes, 3)}


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int]:
    return int((model(images).argmax(1) == labels).sum()), len(labels)


def main() -> None:
    """Measure what has not been measured."""
    cases.measure("several", [{"method": m, "seed": s} for s in SEEDS for m in PASSES], accuracy)


def table() -> str:
    """Test accuracy in percent, mean and standard deviation over the seeds."""
    rows = ["| method | passes per step | test accuracy |", "| --- | --- | --- |"]
    for method in PASSES:
        own = [line for line in cases.read("several") if line["method"] == method]
        if own:
            passes = statistics.fmean(line["passes_per_step"] for line in own)
            rows.append(f"| {method} | {passes:.2f} | {cases.cell([line['accuracy'] for line in own], 100)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
