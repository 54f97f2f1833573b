"""A task of milliseconds: regression with BatchNorm, dropout and noise in its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

from arsam import ARSAM
from arsam.sampling import Adaptive
from tasks import checkpoint, distributed, engine
from tasks.config import Config, Epochs
from tasks.loading import Batches
from tasks.schedule import cosine
from tasks.task import Batch


class Points(Dataset[dict[str, Tensor]]):
    """Points of a line, with noise that is drawn anew on each look."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.full((3,), index / self.count) + 0.1 * torch.from_numpy(np.random.randn(3)).float()
        return {"x": x, "y": x.sum(0, keepdim=True) + 0.1 * torch.randn(1)}


@dataclass(frozen=True)
class Toy:
    """The toy task."""

    count: int = 21
    width: int = 8
    dropout: float = 0.2
    norm: bool = True

    name = "toy"
    metric = "score"

    def dataset(self, split: str) -> Points:
        """Training points, or fewer for validation."""
        return Points(self.count if split == "train" else 10)

    def build(self) -> nn.Module:
        """Two layers."""
        return nn.Sequential(
            nn.Linear(3, self.width),
            nn.BatchNorm1d(self.width) if self.norm else nn.Identity(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, 1),
        )

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """All."""
        return list(model.parameters())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error."""
        return (model(batch["x"]) - batch["y"]).square().mean()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """Minus the mean output, of a fixed input."""
        assert sum(distributed.gathered([len(batch["x"]) for batch in batches])) == 10
        return {"score": -float(model(torch.ones(2, 3)).mean())}


config = Config(
    task=Toy(),
    optimizer=partial(AdamW, lr=1e-2),
    schedule=partial(cosine, warmup=Epochs(1)),
    sharpness=partial(ARSAM, rho=0.1, sampling=partial(Adaptive, window=8, blocks=2, initial=3.0, warmup=Epochs(1))),
    epochs=5,
    batch_size=4,
    num_workers=0,
)
sample = replace(config, epochs=2)

CPU = torch.device("cpu")


def run(out: Path | None, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train the toy, with changes of its config."""
    return engine.train(replace(config, **changes), out, device=CPU, resume=resume, name="toy")


def keys(step: int) -> list[tuple[int, int]]:
    """Of the toy's items in a step."""
    epoch, indices = Batches(21, 4, 5, 0).whole(step)
    return [(epoch, index) for index in indices.tolist()]


def weights(out: Path, name: str = "last.pt") -> dict[str, Any]:
    """A checkpoint of a run."""
    return checkpoint.load(out / name)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, whatever the nesting; seconds aside."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if "second" not in str(key):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
