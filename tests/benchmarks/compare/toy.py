"""A suite of milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from arsam import ARSAM
from arsam.sampling import Never
from benchmarks.compare import workloads
from benchmarks.compare.rows import ROWS
from benchmarks.compare.schema import Data, Row, Setup, Sharpen, Suite

NAMES = ("base", "sam", "base-tuned", "published", "periodic-1.2", "periodic-published", "budget-1.2", "control-random")


def data(seed: int) -> Data:
    """Two classes of 4x4 pictures, bright on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    pictures = torch.randn(40, 1, 4, 4, generator=generator)
    pictures[:, 0, :, :2] += labels[:, None, None]
    return {"train": (pictures, labels), "val": (pictures[:20], labels[:20]), "test": (pictures[20:], labels[20:])}


def network(seed: int) -> nn.Module:
    return workloads.network(1, 2)


def _no_ascent(setup: Setup) -> Sharpen:
    return lambda base, model: ARSAM(base, model=model, sampling=Never())


TOY = Suite(
    "toy",
    data,
    network,
    (*(row for row in ROWS if row.name in NAMES), Row("no-ascent", "ARSAM without ascents", "control", _no_ascent)),
    seeds=2,
    epochs=2,
    rhos=(0.1, 0.1 * 2**0.5),
    tune_seeds=1,
    batch_size=8,
)
