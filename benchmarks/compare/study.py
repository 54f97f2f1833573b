"""Optimizers compared on one small workload: every row of a suite trained on every seed, and tables and figures of it.

All runs of a suite share data, network, schedule and, seed by seed, initial weights and the order of the batches; they
differ in the row alone. A finished run is one JSON file, and is not run again. Data are held in memory.

# N images, B batch
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from arsam import ARSAM, functional
from arsam.reuse import Decayed, Nothing, Orthogonal, Reuse
from arsam.sampling import Adaptive, Always, Bernoulli, Budget, GradientNorm, Periodic, Sampling, Tail
from benchmarks.compare import tables
from benchmarks.speed.memory import Live
from tasks import log
from tasks.classification.data import images
from tasks.errors import UserError
from tasks.pose.codec import SimCC
from tasks.pose.data import PoseData
from tasks.pose.joints import COCO
from tasks.pose.task import PoseTask
from tasks.pose.transforms import Augmentation
from tasks.quant.calibrate import calibrate
from tasks.quant.canonicalise import canonicalise
from tasks.quant.prepare import parameter_groups, prepare

Split = tuple[Tensor, Tensor]  # images [N, c, h, w] float32; labels [N] int64, or for pose [N, K, W + H + 1], see `lspet`
Data = dict[str, Split]  # "train" (its labels may be noisy), "val" and "test"


class Reversed(Decayed):
    """A control: the kept PSF with its sign flipped. If it does as well as the PSF, the direction is not what helps."""

    def mix_(self, gradients: list[Tensor], kept: list[Tensor], age: int, spacing: float | None = None) -> None:
        """g <- g - beta^age PSF."""
        functional.add_scaled_(gradients, kept, torch.tensor(-(self.decay(spacing) ** age)))


class RandomVector(Decayed):
    """A control: noise with the PSF's norm, tensor by tensor. If it does as well as the PSF, any noise of the size does."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- ||PSF|| n / ||n||, n of independent normal entries."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            noise = torch.randn_like(x)
            x.copy_(noise * (x.norm() / noise.norm()))


class PermutedVector(Decayed):
    """A control: the PSF with its entries in another order, tensor by tensor: its sizes without their places."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- PSF permuted."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            x.copy_(x.flatten()[torch.randperm(x.numel(), device=x.device)].view_as(x))


class GradientNoise(Decayed):
    """A control: the difference of the gradients of two ascents, with the PSF's norm, tensor by tensor; at first nothing."""

    _last: list[Tensor] | None = None

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- ||PSF|| (g - g_before) / ||g - g_before||."""
        last, self._last = self._last, [x.clone() for x in gradients]
        super().keep_(gradients, sam_gradients)
        for x, now, before in zip(gradients, self._last, last or self._last, strict=True):
            noise = now - before
            x.copy_(noise * (x.norm() / noise.norm().clamp(min=1e-30)))


class Rounded(Decayed):
    """The PSF as it would be kept in bfloat16, with half the memory."""

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- PSF, rounded."""
        super().keep_(gradients, sam_gradients)
        for x in gradients:
            x.copy_(x.bfloat16())


@dataclass(frozen=True)
class Run:
    """What a row's sampling rule may be built from.

    Args:
        total: steps.
        per_epoch: steps.
        share: of steps with an ascent.
        seed: of the run.
    """

    total: int
    per_epoch: int
    share: float
    seed: int


@dataclass(frozen=True)
class Row:
    """An optimizer of the comparison.

    Args:
        name: in tables and file names.
        sampling: builds the sampling rule; None: the base optimizer alone.
        reuse: builds the reuse rule.
        share: of steps with an ascent; or the name of an earlier row: that row's on the same seed.
        rho_of: the row whose rho is taken; None: chosen for this row on held-out images.
        rho_scale: factor on the suite's candidates of rho.
        adaptive: ASAM's perturbation.
        lr: factor on the suite's learning rate.
        weight_decay: factor on the suite's weight decay.
        part: of the batch that the second pass of an ascent sees, its first examples.
        theirs: a class of pytorch-optimizer that takes ARSAM's place; `sampling` then only says that there is a rho.
    """

    name: str
    sampling: Callable[[Run], Sampling] | None = None
    reuse: Callable[[], Reuse] = Nothing
    share: float | str = 0.0
    rho_of: str | None = None
    rho_scale: float = 1.0
    adaptive: bool = False
    lr: float = 1.0
    weight_decay: float = 1.0
    part: float = 1.0
    theirs: str | None = None


def accuracy(outputs: Tensor, labels: Tensor) -> tuple[float, int]:
    """How many images are classified right, and of how many."""
    return float((outputs.argmax(1) == labels).sum()), len(labels)


@dataclass(frozen=True)
class Suite:
    """A workload and its rows.

    Args:
        name: of the folder under benchmarks.
        data: builds the data.
        rows: "base" and "sam" among them, and before the rows that refer to others.
        network: builds it, from the generator of the seed.
        seeds: so many by default.
        epochs: of each run.
        rhos: candidates, >= 1 of them.
        tune_seeds: seeds that each candidate is tried on.
        batch_size: B; the last, smaller batch of an epoch is left out.
        lr: peak of the one-cycle schedule.
        weight_decay: on all parameters.
        base: the base optimizer, called with parameters, lr and weight_decay.
        groups: the parameters that it gets.
        loss: of outputs and labels.
        score: of outputs and labels: a sum and what it is to be divided by. Its name is the metric's.
    """

    name: str
    data: Callable[[], Data]
    rows: tuple[Row, ...]
    network: Callable[[], nn.Module]
    seeds: int
    epochs: int
    rhos: tuple[float, ...]
    tune_seeds: int = 1
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    base: Callable[..., Optimizer] = partial(SGD, momentum=0.9)
    groups: Callable[[nn.Module], Any] = nn.Module.parameters
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    score: Callable[[Tensor, Tensor], tuple[float, int]] = accuracy

    @property
    def metric(self) -> str:
        """Its name, in records and tables."""
        return self.score.__name__


def lasting() -> Decayed:
    """Reuse until the next ascent, its decay following the spacing."""
    return Decayed("auto", horizon=None)


def _even(run: Run) -> Sampling:
    return Budget(1 + run.share, run.total)


def _random(run: Run) -> Sampling:
    return Bernoulli(run.share, seed=run.seed)


def _late(run: Run) -> Sampling:
    return Tail(run.share, run.total)


def _adaptive(run: Run, **settings: Any) -> Sampling:
    return Adaptive(warmup=3 * run.per_epoch, seed=run.seed, **settings)  # the authors' warm-up


# Late-phase ascents leave no one-pass step behind them, so that reuse would change nothing there.
ROWS = (
    Row("base"),
    Row("sam", lambda run: Always()),
    Row("asam", lambda run: Always(), adaptive=True, rho_scale=4.0),
    Row("arsam", _adaptive, Decayed),
    Row("arsam-log", partial(_adaptive, estimator="log"), Decayed),
    Row("periodic-arsam", _even, share="arsam", rho_of="periodic-1.2"),
    Row("bernoulli-arsam", _random, share="arsam", rho_of="periodic-1.2"),
    Row("late-arsam", _late, share="arsam", rho_of="periodic-1.2"),
    Row("periodic-arsam-reuse", _even, lasting, share="arsam", rho_of="arsam"),
    Row("bernoulli-arsam-reuse", _random, lasting, share="arsam", rho_of="arsam"),
    Row("looksam", lambda run: Periodic(5), Orthogonal),
    Row("ae-sam", lambda run: GradientNorm(1.0, -1.0, run.total), rho_of="sam"),
    Row("budget-1.2", _even, lasting, share=0.2),
    *(Row(f"budget-{1 + share}", _even, lasting, share=share, rho_of="budget-1.2") for share in (0.05, 0.1, 0.4)),
    *(
        Row(f"{name}-{1 + share}", rule, share=share, rho_of=None if (name, share) == ("periodic", 0.2) else "periodic-1.2")
        for share in (0.05, 0.1, 0.2, 0.4)
        for name, rule in (("periodic", _even), ("bernoulli", _random), ("late", _late))
    ),
    Row("budget-1.2-beta1.0", _even, partial(Decayed, 1.0, horizon=None), share=0.2),
    *(
        Row(f"budget-{1 + share}-beta{beta}", _even, partial(Decayed, beta, horizon=None), share, rho_of)
        for share, beta, rho_of in (
            (0.2, 0.8, "budget-1.2"),
            (0.05, 0.9, "budget-1.2"),
            (0.05, 0.98, "budget-1.2"),
            (0.05, 1.0, "budget-1.2-beta1.0"),
        )
    ),
    Row("budget-1.2-short", _even, Decayed, share=0.2, rho_of="budget-1.2"),
    Row("control-reversed", _even, lambda: Reversed("auto", horizon=None), share=0.2, rho_of="budget-1.2"),
    Row("control-random", _even, lambda: RandomVector("auto", horizon=None), share=0.2, rho_of="budget-1.2"),
    Row("control-permuted", _even, lambda: PermutedVector("auto", horizon=None), share=0.2, rho_of="budget-1.2"),
    Row("control-gradient-noise", _even, lambda: GradientNoise("auto", horizon=None), share=0.2, rho_of="budget-1.2"),
    Row("budget-1.2-bf16", _even, lambda: Rounded("auto", horizon=None), share=0.2, rho_of="budget-1.2"),
    Row("budget-1.2-half-batch", _even, lasting, share=0.2, rho_of="budget-1.2", part=0.5),
    Row("sam-half-batch", lambda run: Always(), rho_of="sam", part=0.5),
    Row("base-decay-x4", weight_decay=4.0),
    Row("base-lr-x2", lr=2.0),
    *(
        Row(f"pytorch-optimizer-{name}", lambda run: Always(), rho_of="sam", theirs=name)
        for name in ("SAM", "GSAM", "WSAM", "FriendlySAM", "LookSAM")
    ),
)


def _noisy(labels: Tensor, share: float, classes: int = 10) -> Tensor:
    """Labels, of which a share is moved to one of the other classes, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    return noisy


def _prepared(splits: Data, noise: float) -> Data:
    """Channels with mean 0 and deviation 1 on the training images, and training labels with noise."""
    x, y = splits["train"]
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    data = {name: ((x - mean) / deviation, y) for name, (x, y) in splits.items()}
    return {**data, "train": (data["train"][0], _noisy(y, noise))} if noise else data


def digits(noise: float = 0.4) -> Data:
    """Scikit-learn's digits, 8x8: 600 to train on, 300 held out, 897 to test on."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(bunch.images, dtype=torch.float32)[order, None]
    y = torch.tensor(bunch.target, dtype=torch.int64)[order]
    parts = {"train": slice(0, 600), "val": slice(600, 900), "test": slice(900, None)}
    return _prepared({name: (x[part], y[part]) for name, part in parts.items()}, noise)


@cache
def cifar16(noise: float = 0.3) -> Data:
    """CIFAR-10 averaged down to 16x16: 2,000 training images, 2,000 more of the training set held out, the 10,000 to test on.

    Raises:
        UserError: no such data.
    """

    def read(split: str, limit: int | None) -> Split:
        items = list(images("data/cifar10", split, side=32, augment=False, limit=limit))  # type: ignore[arg-type]
        pictures = torch.stack([item["image"] for item in items]).float() / 255
        return nn.functional.avg_pool2d(pictures, 2), torch.stack([item["label"] for item in items])

    x, y = read("train", 4000)
    return _prepared({"train": (x[:2000], y[:2000]), "val": (x[2000:], y[2000:]), "test": read("val", None)}, noise)


CODEC = SimCC((48, 64), split_ratio=1.0, sigma=2.0)


def lspet() -> Data:
    """Leeds Sports Pose Extended: crops of 64x48, 2,000 people to train on, the 400 others held out, 600 to test on.

    Not augmented. Labels: SimCC's W + H bins and, last, the weight of the joint.

    Raises:
        UserError: no such data.
    """
    task = PoseTask(root="data/lspet", codec=CODEC)
    plain = Augmentation(flip=0.0, half_body=0.0, shift=0.0, scale=(1.0, 1.0), rotation=0.0)

    def read(split: str) -> Split:
        people = PoseData(task.dataset(split).people, CODEC, plain)
        items = [people[i] for i in range(len(people))]
        labels = [torch.cat([item["target"], item["weight"][:, None]], dim=1) for item in items]
        return torch.stack([item["image"] for item in items]).float() / 255, torch.stack(labels)

    x, y = read("train")
    return _prepared({"train": (x[:2000], y[:2000]), "val": (x[2000:], y[2000:]), "test": read("val")}, 0.0)


def _pose_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return CODEC.loss(logits, labels[..., :-1], labels[..., -1]) / len(logits)


def pck(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """How many of the labelled joints are found within a tenth of the crop's height, and of how many."""
    found, _ = CODEC.decode(logits.numpy(force=True))
    truth, _ = CODEC.decode(labels[..., :-1].numpy(force=True))
    labelled = labels[..., -1].numpy(force=True) > 0
    near = np.linalg.norm(found - truth, axis=2) < CODEC.input_size[1] / 10
    return float((near & labelled).sum()), int(labelled.sum())


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        same = stride == 1 and inner == outer
        self.short = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.short(x))


def _stages(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    """A ResNet of three stages, one block each."""
    return [
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _Block(width, width, 1),
        _Block(width, 2 * width, 2),
        _Block(2 * width, 4 * width, 2),
    ]


def network(channels: int, width: int, classes: int = 10) -> nn.Module:
    """The ResNet and a linear classifier of the mean over all places."""
    return nn.Sequential(*_stages(channels, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def pose_network(width: int = 16) -> nn.Module:
    """The ResNet at half the resolution, a map per joint, and a linear classifier per axis that all joints share."""
    columns, rows = CODEC.input_size
    joints = len(COCO)
    return nn.Sequential(
        *_stages(3, width, stride=2),
        nn.Conv2d(4 * width, 4 * joints, 1),
        nn.PixelShuffle(2),
        nn.Flatten(2),
        nn.Linear(columns * rows // 16, sum(CODEC.bins)),
    )


@cache
def _float_state() -> dict[str, Tensor]:
    """A float network trained on the clean images with the base optimizer."""
    suite = SUITES["cifar16-clean"]
    model, _ = train(suite, suite.rows[0], suite.data(), 0, 0.0, 0.0)
    return model.state_dict()


def quantized() -> nn.Module:
    """The float network at 4 bits, calibrated: the same for all seeds, which differ in the order of the batches."""
    x, _ = cifar16(noise=0.0)["train"]
    model = network(3, 16)
    model.load_state_dict(_float_state())
    prepared = prepare(canonicalise(model.eval(), x[:1]), weight_bits=4, act_bits=4)
    calibrate(prepared, [x[:256]])
    return prepared


_DIGITS = Suite("digits", digits, ROWS, partial(network, 1, 16), seeds=5, epochs=40, rhos=(0.2, 0.5, 1.0))
_CIFAR = Suite("cifar16", cifar16, ROWS, partial(network, 3, 16), seeds=5, epochs=120, rhos=(0.2, 0.5, 1.0))
_QUICK = ("base", "sam", "arsam", "budget-1.2", "periodic-1.2", "late-1.2")
SUITES = {
    "quick": replace(_DIGITS, name="quick", rows=tuple(row for row in ROWS if row.name in _QUICK), seeds=3),
    "digits": _DIGITS,
    "cifar16": _CIFAR,
    "cifar16-clean": replace(_CIFAR, name="cifar16-clean", data=partial(cifar16, 0.0), epochs=60),
    "cifar16-w4a4": replace(
        _CIFAR, name="cifar16-w4a4", data=partial(cifar16, 0.0), rows=(Row("calibrated", lr=0.0), *ROWS),
        network=quantized, groups=parameter_groups, epochs=30, lr=0.01,
    ),
    "lspet": replace(
        _CIFAR, name="lspet", data=lspet, network=pose_network, loss=_pose_loss, score=pck,
        base=AdamW, lr=3e-3, weight_decay=1e-2, epochs=25, rhos=(0.01, 0.05, 0.2),
    ),
}  # fmt: skip


def _optimizer(suite: Suite, row: Row, model: nn.Module, rho: float, rule: Sampling | None) -> Optimizer:
    base = suite.base(suite.groups(model), lr=suite.lr * row.lr, weight_decay=suite.weight_decay * row.weight_decay)
    if rule is None:
        return base
    if row.theirs is not None:
        return _theirs(suite, row, model, rho, base)
    return ARSAM(base, rho=rho, adaptive=row.adaptive, sampling=rule, reuse=row.reuse(), model=model)


def _theirs(suite: Suite, row: Row, model: nn.Module, rho: float, base: Optimizer) -> Optimizer:
    """An optimizer of pytorch-optimizer, its own settings at their defaults, save LookSAM's k, which is 5 as in ours.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pytorch_optimizer
    except ImportError as e:
        raise UserError(f"row {row.name}: pytorch-optimizer is not installed (pip install pytorch-optimizer)") from e
    kind = getattr(pytorch_optimizer, str(row.theirs))
    if row.theirs == "GSAM":
        constant = SimpleNamespace(step=lambda: rho)
        return kind(base.param_groups, base, model, rho_scheduler=constant)
    settings = {"lr": suite.lr * row.lr, "weight_decay": suite.weight_decay * row.weight_decay}
    if row.theirs == "WSAM":
        return kind(model, suite.groups(model), suite.base, rho=rho, **settings)
    if row.theirs == "LookSAM":
        settings["k"] = 5
    return kind(suite.groups(model), suite.base, rho=rho, **settings)


def _step(row: Row, optimizer: Any, closure: Callable[[], Tensor]) -> Tensor:
    """One step, which returns the loss before it."""
    if row.theirs == "GSAM":
        return optimizer.step(lambda: (None, torch.enable_grad()(closure)().detach()))[1]
    if row.theirs in ("SAM", "FriendlySAM", "LookSAM"):  # their step() does the second pass only
        loss = closure()
        optimizer.step(closure)
        return loss
    return optimizer.step(closure)


def train(
    suite: Suite,
    row: Row,
    data: Data,
    seed: int,
    rho: float,
    share: float,
    *,
    split: str = "test",
    after: Callable[[int, Optimizer], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a row once, on the device of the data.

    Args:
        suite: the workload.
        row: the optimizer.
        data: of the suite.
        seed: of the weights, of the order of the batches and of the sampling rule.
        rho: radius.
        share: of ascents, for rules that take one.
        split: evaluated after the last step; there is no choice of a best epoch.
        after: called with (step, optimizer) after every step.

    Returns:
        The trained model, and what is written to the run's file, save its names.
    """
    x, y = data["train"]
    per_epoch = len(x) // suite.batch_size
    total = per_epoch * suite.epochs
    torch.manual_seed(seed)
    model = suite.network().to(x.device).to(memory_format=torch.channels_last).train()
    rule = row.sampling(Run(total, per_epoch, share, seed)) if row.sampling is not None else None
    optimizer = _optimizer(suite, row, model, rho, rule)
    schedule = OneCycleLR(optimizer, suite.lr * row.lr, total_steps=total, cycle_momentum=False)
    order = torch.Generator().manual_seed(seed)
    rates: list[float] = []
    losses = torch.zeros((), device=x.device)
    passes = 0
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(total):
        if step % per_epoch == 0:
            indices = torch.randperm(len(x), generator=order)
            losses.zero_()
        batch = indices[step % per_epoch * suite.batch_size :][: suite.batch_size]  # pyright: ignore[reportPossiblyUnboundVariable]
        inputs, labels = x[batch].contiguous(memory_format=torch.channels_last), y[batch]
        sizes = iter((len(labels), round(row.part * len(labels))))

        def closure(inputs: Tensor = inputs, labels: Tensor = labels, sizes: Iterator[int] = sizes) -> Tensor:
            nonlocal passes
            passes += 1
            size = next(sizes)
            optimizer.zero_grad()
            loss = suite.loss(model(inputs[:size]), labels[:size])
            loss.backward()
            return loss

        losses += _step(row, optimizer, closure).detach()
        schedule.step()
        if isinstance(optimizer, ARSAM) and isinstance(optimizer.sampling, Adaptive) and (step + 1) % per_epoch == 0:
            rates.append(optimizer.sampling.rate)
        if after is not None:
            after(step, optimizer)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return model, {
        suite.metric: _score(suite, model, *data[split]),
        "training_loss": losses.item() / per_epoch,  # of the last epoch, on the noisy labels
        "steps": total,
        "ascents": passes - total,
        "passes_per_step": passes / total,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rate": rates,  # S of the adaptive rule after each epoch
    }


@torch.no_grad()
def _score(suite: Suite, model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    parts = [suite.score(model(a), b) for a, b in zip(x.split(500), y.split(500), strict=True)]
    return sum(part for part, _ in parts) / sum(whole for _, whole in parts)


def memory(suite: Suite, row: Row, data: Data) -> float:
    """Peak megabytes of weights, gradients, states and activations over four steps, an ascent on every second one."""
    rule = row.sampling(Run(100, 1, 0.5, 0)) if row.sampling is not None else None
    if rule is not None and not isinstance(rule, (Always, Adaptive)):
        rule = Periodic(2)
    x, y = (part[: suite.batch_size] for part in data["train"])
    suite.network()  # what it keeps for later calls, such as a trained float network, is not the row's
    with Live() as live:
        model = suite.network().to(x.device).train()
        optimizer = _optimizer(suite, row, model, 0.1, rule)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = suite.loss(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            _step(row, optimizer, closure)
    return live.peak / 1e6


def ageing(suite: Suite, data: Data, rho: float, ages: int = 50, probes: int = 6) -> dict[str, Any]:
    """Cosine of a PSF with the PSF of j steps before, on the path of SAM (seed 0), at several times of the training.

    Each is of its own batch, so that the cosine at j = 1 is what is common to two batches, and its fall is what age costs.
    """
    row = Row("probe", lambda run: Always(), Decayed)
    total = len(data["train"][0]) // suite.batch_size * suite.epochs
    probes = min(probes, total // 2)
    ages = min(ages, total // probes - 1)
    starts = [i * total // probes + (total // probes - ages - 1) // 2 for i in range(probes)]
    cosines: list[list[float]] = []
    kept: list[Tensor] = []

    def look(step: int, optimizer: Optimizer) -> None:
        if any(start <= step <= start + ages for start in starts):
            psf = optimizer.state_dict()["arsam"]["kept"].values()
            kept.append(torch.cat([x.flatten() for x in psf]))
        if step - ages in starts:
            directions = torch.stack([x / x.norm() for x in kept])
            products = directions @ directions.T
            cosines.append([float(products.diagonal(j).mean()) for j in range(1, ages + 1)])
            kept.clear()

    train(suite, row, data, 0, rho, 1.0, after=look)
    mean = [statistics.fmean(values) for values in zip(*cosines, strict=True)]
    return {"rho": rho, "starts": starts, "ages": list(range(1, ages + 1)), "cosine": mean, "cosine_by_start": cosines}


def compare(
    suite: Suite, out: Path, seeds: int, device: torch.device, only: list[str] | None = None, rho: float | None = None
) -> None:
    """Run what has not been run, seed by seed and row by row, and write the tables after every seed.

    Args:
        suite: the workload.
        out: gets runs/*.json, tune/*.json, table.md, table.json, pareto.png, ageing.json, ageing.png, environment.json.
        seeds: 0, 1, ..., seeds - 1.
        device: where.
        only: rows by name; None: all of the suite. "base", "sam" and rows that these refer to are always run.
        rho: for all rows, each with its factor; None: chosen on held-out images from the suite's candidates.

    Raises:
        UserError: no such row, no data, or `out` holds runs of other settings.
    """
    rows = _chosen(suite, only)
    if rho is not None:
        suite = replace(suite, rhos=(rho,))
    settings = {k: v for k, v in vars(suite).items() if k not in ("rows", "seeds") and not callable(v)}
    settings = json.loads(json.dumps(settings))  # as it is read back
    if (out / "environment.json").exists():
        before = json.loads((out / "environment.json").read_text())["suite"]
        changed = [f"{k} was {before.get(k)}, is {v}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise UserError(f"{out}: holds runs of other settings: {'; '.join(changed)}; name another --out")
    data = {name: (x.to(device), y.to(device)) for name, (x, y) in suite.data().items()}
    for folder in ("runs", "tune"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    log.write_json(out / "environment.json", {**log.environment(device), "suite": settings})
    radius = {row.name: _tuned(suite, row, data, out) for row in rows if row.rho_of is None}
    radius |= {row.name: radius[row.rho_of] for row in rows if row.rho_of is not None}
    megabytes: dict[str, float] = {}
    for seed in range(seeds):
        for row in rows:
            path = out / "runs" / f"{row.name}-{seed}.json"
            rho = None if row.sampling is None else radius[row.name]
            if path.exists():
                before = json.loads(path.read_text())["rho"]
                if before != rho:
                    raise UserError(f"{path}: has rho {before}, the one chosen is {rho}; delete it or name another --out")
                continue
            if row.name not in megabytes:
                megabytes[row.name] = memory(suite, row, data)
            share = row.share
            if isinstance(share, str):
                model = json.loads((out / "runs" / f"{share}-{seed}.json").read_text())
                share = model["ascents"] / model["steps"]
            _, result = train(suite, row, data, seed, radius[row.name], share)
            names = {"suite": suite.name, "row": row.name, "seed": seed, "rho": rho}
            log.write_json(path, {**names, **result, "peak_memory_mb": megabytes[row.name]})
            print(f"seed {seed}  {row.name:24} {_run_line(suite, result)}", flush=True)
        tables.write(suite, out)
    if not (out / "ageing.json").exists():
        log.write_json(out / "ageing.json", ageing(suite, data, radius["sam"]))
    tables.write(suite, out)


def _chosen(suite: Suite, only: list[str] | None) -> list[Row]:
    known = {row.name: row for row in suite.rows}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise UserError(f"{unknown[0]}: no row of the suite {suite.name}; its rows are {', '.join(known)}")
    names = {*(known if only is None else only), "base", "sam"}
    while True:
        needed = {x for name in names for x in (known[name].share, known[name].rho_of) if isinstance(x, str)} - names
        if not needed:
            return [row for row in suite.rows if row.name in names]
        names |= needed


def _tuned(suite: Suite, row: Row, data: Data, out: Path) -> float:
    """The candidate of rho with the best mean metric on the held-out images; the smallest of equals.

    Where that is the smallest or the largest candidate, half or twice of it is tried too, up to three times.
    """
    candidates = [rho * row.rho_scale for rho in suite.rhos]
    if row.sampling is None or len(candidates) == 1:
        return candidates[0]
    share = row.share
    if isinstance(share, str):
        raise ValueError(f"row {row.name}: with a share of another row, rho_of must name a row too")

    def score(rho: float) -> float:
        found: list[float] = []
        for seed in range(1000, 1000 + suite.tune_seeds):  # seeds of their own
            path = out / "tune" / f"{row.name}-rho{rho:g}-{seed}.json"
            if not path.exists():
                _, result = train(suite, row, data, seed, rho, share, split="val")
                log.write_json(path, {"suite": suite.name, "row": row.name, "seed": seed, "rho": rho, **result})
                print(f"held out  {row.name:24} rho {rho:<5g} {_run_line(suite, result)}", flush=True)
            found.append(json.loads(path.read_text())[suite.metric])
        return statistics.fmean(found)

    scores: dict[float, float] = {}
    while True:
        scores |= {rho: score(rho) for rho in candidates}
        best = max(scores, key=lambda rho: (scores[rho], -rho))
        if len(scores) == len(suite.rhos) + 3 or best not in (min(scores), max(scores)):
            return best
        candidates = [best / 2 if best == min(scores) else 2 * best]


def _run_line(suite: Suite, result: dict[str, Any]) -> str:
    return f"{100 * result[suite.metric]:6.2f} %  {result['passes_per_step']:.3f} passes/step  {result['seconds']:.1f} s"
