"""What a comparison is made of: a suite (the workload), its rows (the optimizers), and what is searched for each row.

# N items, B batch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tasks.config import Config

Split = tuple[Tensor, Tensor]  # inputs [N, ...] float32; labels [N] int64, or for poses [N, K, W + H + 1]
Data = dict[str, Split]  # "train" and "val" (whose labels may be noisy), and "test"
Settings = dict[str, float]  # name -> value, of what is searched
Sharpen = Callable[..., Any]  # called with the base optimizer and `model`, returns what is stepped with a closure
Group = Literal["base", "sam", "arsam", "rival", "no reuse", "decay", "schedule", "package", "control"]


@dataclass(frozen=True)
class Setup:
    """What a row's optimizer is built from.

    Args:
        total_steps: of the run.
        steps_per_epoch: of the run.
        seed: of the run.
        ascents: share of the steps that ascend, in [0, 1], for rules that are given one.
        settings: the searched values, "rho" among them where the row has one.
    """

    total_steps: int
    steps_per_epoch: int
    seed: int
    ascents: float
    settings: Settings


@dataclass(frozen=True)
class Knob:
    """A setting that is chosen on held-out images.

    Its candidates lie on a ladder, each `ratio` times the one before. They are tried from the starting ones outwards, until
    the best one has both its neighbours measured.

    Args:
        name: of the setting.
        start: the first candidates, neighbours on the ladder; empty: the suite's own for "rho".
        ratio: of neighbours, > 1.
        scale: factor on the suite's own candidates.
        largest: no candidate beyond it.
    """

    name: str
    start: tuple[float, ...] = ()
    ratio: float = 2**0.5
    scale: float = 1.0
    largest: float = float("inf")


@dataclass(frozen=True)
class Row:
    """An optimizer of the comparison.

    Args:
        name: in records and on the command line.
        title: in tables and figures.
        group: what kind of row it is; figures and tables choose by it.
        sharpen: builds what takes the base optimizer's place; None: the base optimizer alone.
        knobs: what is searched, one after the other.
        ascents: share of the steps that ascend, for rules that are given one; or the name of an earlier row: as many as that
            row had on the same seed.
        borrows: the row whose settings are taken instead of a search, for controls.
        settings: values that are not searched.
        part: share of the batch, its first examples, that the second pass sees.
        ema: decay per step of averaged weights, which are then the evaluated ones.
        early: the epoch is chosen on held-out images.
        reestimate: BatchNorm's statistics are taken anew at the end, for rows that train at weights they do not keep.
    """

    name: str
    title: str
    group: Group
    sharpen: Callable[[Setup], Sharpen] | None = None
    knobs: tuple[Knob, ...] = ()
    ascents: float | str = 0.0
    borrows: str | None = None
    settings: Settings = field(default_factory=dict)
    part: float = 1.0
    ema: float | None = None
    early: bool = False
    reestimate: bool = False


def accuracy(outputs: Tensor, labels: Tensor) -> tuple[float, int]:
    """How many images are classified right, and of how many."""
    return float((outputs.argmax(1) == labels).sum()), len(labels)


@dataclass(frozen=True)
class Suite:
    """A workload and its rows.

    Args:
        name: of its file under benchmarks/records.
        data: builds the data of a seed: which images are held out and which labels are wrong differ by the seed.
        network: builds the network of a seed, from torch's generator.
        rows: "base" and "sam" among them, and before the rows that refer to others.
        seeds: so many by default.
        epochs: of each run.
        rhos: the first candidates of rho, neighbours on a ladder of sqrt(2).
        tune_seeds: seeds that each candidate is tried on.
        batch_size: B; a remainder of an epoch waits for the next one's order.
        lr: peak of the schedule.
        weight_decay: on all parameters.
        base: the base optimizer, called with parameters, lr and weight_decay.
        groups: the parameters that it gets.
        loss: of outputs and labels.
        score: of outputs and labels: a sum and what it is to be divided by. Its name is the metric's.
        about: what is learned, in a sentence.
    """

    name: str
    data: Callable[[int], Data]
    network: Callable[[int], nn.Module]
    rows: tuple[Row, ...]
    seeds: int
    epochs: int
    rhos: tuple[float, ...]
    tune_seeds: int = 3
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    base: Callable[..., Optimizer] = partial(SGD, momentum=0.9)
    groups: Callable[[nn.Module], Any] = nn.Module.parameters
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    score: Callable[[Tensor, Tensor], tuple[float, int]] = accuracy
    about: str = ""

    @property
    def metric(self) -> str:
        """Its name, in records and tables."""
        return self.score.__name__

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Large:
    """A workload that is a config, for larger machines; its rows take the place of the config's sharpness.

    Args:
        name: of its file under benchmarks/records.
        config: the baseline's.
        rows: as of `Suite`.
        rhos: the first candidates of rho, neighbours on a ladder of sqrt(2).
        seeds: so many by default.
        tune_seeds: seeds that each candidate is tried on.
        held_out: share of the training split that settings are chosen on.
        tune_epochs: of the runs that settings are chosen by; None: the config's. A shorter run orders values of rho alike
            as long as its training loss has come down.
        about: what is learned, in a sentence.
    """

    name: str
    config: Config
    rows: tuple[Row, ...]
    rhos: tuple[float, ...]
    seeds: int = 3
    tune_seeds: int = 1
    held_out: float = 0.1
    tune_epochs: int | None = None
    about: str = ""

    @property
    def metric(self) -> str:
        """Its name, in records and tables."""
        return self.config.task.metric

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)
