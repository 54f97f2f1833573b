"""A suite as a task of the training loop: tensors in memory, answered batch by batch, so that loading costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from benchmarks.compare.schema import Data, Row, Settings, Setup, Split, Suite
from tasks.config import Config
from tasks.schedule import cosine
from tasks.task import Batch


class Tensors(Dataset[Batch]):
    """A split that is asked for whole batches.

    Args:
        split: inputs and labels, of one length.
    """

    def __init__(self, split: Split) -> None:
        self.inputs, self.labels = split

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}

    def batch(self, indices: Sequence[int]) -> Batch:
        """The items of these indices as one batch."""
        chosen = torch.as_tensor(indices)
        return {"inputs": self.inputs[chosen].contiguous(memory_format=torch.channels_last), "labels": self.labels[chosen]}


class InMemory:
    """A suite's workload as the loop asks for it.

    Args:
        suite: gives network, loss and score.
        data: of the seed.
        seed: of the network.
        split: "test" or "val": what "val" stands for in the loop.
        reestimate: BatchNorm's statistics are taken from the training images before an evaluation.
        also: another split whose score is wanted beside it.

    Attributes:
        history: the figures of every evaluation.
    """

    name = "study"

    def __init__(
        self, suite: Suite, data: Data, seed: int, split: str, reestimate: bool = False, also: str | None = None
    ) -> None:
        self.suite = suite
        self.data = data
        self.seed = seed
        self.split = split
        self.reestimate = reestimate
        self.also = also
        self.history: list[dict[str, float]] = []

    def __repr__(self) -> str:
        return f"InMemory({self.suite.name}, seed {self.seed}, {self.split})"

    @property
    def metric(self) -> str:
        """The suite's."""
        return self.suite.metric

    def dataset(self, split: str) -> Tensors:
        """The training images, or those that are evaluated."""
        return Tensors(self.data["train" if split == "train" else self.split])

    def build(self) -> nn.Module:
        """The suite's network."""
        return self.suite.network(self.seed)

    def parameters(self, model: nn.Module) -> Any:
        """The suite's groups."""
        return self.suite.groups(model)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The suite's, of the part of the batch that the model carries while a second pass sees less of it."""
        size = round(getattr(model, "part", 1.0) * len(batch["labels"]))
        return self.suite.loss(model(batch["inputs"][:size]), batch["labels"][:size])

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """The suite's metric, and the loss on the training images, both in evaluation mode."""
        if self.reestimate:
            model = copy.deepcopy(model)
            update_bn(self.data["train"][0].split(self.suite.batch_size), model)
            model.eval()
        found = {self.metric: self._score(model, self.split), "training_loss": self._training_loss(model)}
        if self.also is not None:
            found[self.also] = self._score(model, self.also)
        self.history.append(found)
        return found

    def _score(self, model: nn.Module, split: str) -> float:
        pairs = zip(*(part.split(500) for part in self.data[split]), strict=True)
        parts = [self.suite.score(model(inputs), labels) for inputs, labels in pairs]
        return sum(part for part, _ in parts) / sum(whole for _, whole in parts)

    def _training_loss(self, model: nn.Module) -> float:
        inputs, labels = self.data["train"]
        parts = [self.suite.loss(model(a), b) * len(b) for a, b in zip(inputs.split(500), labels.split(500), strict=True)]
        return float(sum(parts)) / len(labels)


def configured(
    suite: Suite, row: Row, data: Data, seed: int, settings: Settings, ascents: float = 0.0, split: str = "test"
) -> Config:
    """The run of a row as a config of the training loop.

    Args:
        suite: the workload.
        row: the optimizer.
        data: of the suite and seed.
        seed: of the weights, of the order of the batches and of the sampling rule.
        settings: "rho" and others; "lr", "weight_decay" and "epochs" are factors on the suite's.
        ascents: share of the steps that ascend, for rules that are given one.
        split: that is evaluated.
    """
    values = {**row.settings, **settings}
    epochs = max(1, round(suite.epochs * values.get("epochs", 1.0)))
    per_epoch = len(data["train"][1]) // min(suite.batch_size, len(data["train"][1]))
    total = per_epoch * epochs
    setup = Setup(total, per_epoch, seed, ascents, values)
    also = "val" if row.early and split != "val" else None
    return Config(
        task=InMemory(suite, data, seed, split, row.reestimate, also),
        optimizer=partial(
            suite.base, lr=suite.lr * values.get("lr", 1.0), weight_decay=suite.weight_decay * values.get("weight_decay", 1.0)
        ),
        sharpness=None if row.sharpen is None else row.sharpen(setup),
        schedule=partial(cosine, warmup=round(0.3 * total), start=0.04),
        epochs=epochs,
        batch_size=suite.batch_size,
        seed=seed,
        num_workers=0,
        eval_every=1 if row.early else epochs,
        patience=total,  # a row whose weights are lost is a result too
        ema=row.ema,
    )
