"""One step: clipping, micro-batches, precision, NaN and inf."""

from __future__ import annotations

import dataclasses
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling
from tasks import loading, log
from tasks.errors import UserError
from tests.tasks import toy


class Recorder(SGD):
    """SGD that keeps the norm of every gradient it was given."""

    norms: list[float]

    def step(self, closure: Any = None) -> Any:
        """As SGD's."""
        loss = closure() if closure is not None else None
        self.__dict__.setdefault("norms", []).append(
            math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"]))
        )
        super().step()
        return loss


def clipped(out: Path, **changes: Any) -> list[float]:
    """The norms of a run's gradients as the base optimizer gets them, clipped to 0.01."""
    made: list[Recorder] = []

    def build(parameters: Any) -> Recorder:
        made.append(Recorder(parameters, lr=1e-3))
        return made[-1]

    toy.run(out, optimizer=build, clip_norm=0.01, **changes)
    return made[0].norms


@pytest.mark.parametrize("sharp", [False, True])
def test_clipping_is_of_the_gradient_that_updates(tmp_path: Path, sharp: bool) -> None:
    """With ARSAM it is the mixed one that is clipped, once. Kills: clipping of each pass, of g before mixing."""
    rules = {"sampling": partial(sampling.Periodic, 3), "reuse": partial(reuse.Decayed)}
    sharpness = partial(ARSAM, rho=5.0, **rules) if sharp else None  # type: ignore[arg-type]
    norms = clipped(tmp_path, sharpness=sharpness)
    assert len(norms) == 25
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    if sharp:  # were each pass clipped, the mixture of clipped gradients would exceed the norm or fall short of it
        assert min(norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("sharp", [False, True])
def test_clipping_is_of_the_unscaled_gradient(tmp_path: Path, sharp: bool) -> None:
    """Under a GradScaler. Kills: a norm compared with that of the scaled gradient, which then vanishes."""
    norms = clipped(tmp_path, precision="fp16", **({} if sharp else {"sharpness": None}))
    assert max(norms) == pytest.approx(0.01, rel=1e-2)
    assert min(norms) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("sharp", [False, True])
def test_micro_batches_change_nothing(tmp_path: Path, sharp: bool) -> None:
    """Without BatchNorm and dropout. Kills: a mean of means of unequal parts, a second pass over the last part only."""
    task = toy.Toy(norm=False, dropout=0.0)
    changes = {"task": task, "batch_size": 7, **({} if sharp else {"sharpness": None})}
    for parts in (1, 3):
        toy.run(tmp_path / str(parts), accumulate=parts, **changes)
    models = [toy.weights(tmp_path / str(parts))["model"] for parts in (1, 3)]
    torch.testing.assert_close(models[0], models[1], atol=1e-6, rtol=0)


@cache
def seen(step: int) -> Tensor:
    """The inputs of the toy's step, [4, 3]."""
    data = loading.Seeded(toy.config.task.dataset("train"), 0)
    return torch.stack([data[key]["x"] for key in loading.Batches(21, 4, 5, 0).keys(step)])


@dataclasses.dataclass(frozen=True)
class Poisoned(toy.Toy):
    """Gives NaN on the inputs of some steps."""

    steps: tuple[int, ...] = ()

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The toy's, of a poisoned copy."""
        poison = float("nan") if any(torch.equal(batch["x"], seen(step)) for step in self.steps) else 0.0
        return super().loss(model, {**batch, "x": batch["x"] + poison})


@pytest.mark.parametrize("changes", [{}, {"sharpness": None}, {"precision": "fp16"}], ids=["arsam", "baseline", "fp16"])
def test_nan_batches_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A NaN in the data of two steps. Kills: weights, averages or running statistics that take it in; a silent skip."""
    result = toy.run(tmp_path, task=Poisoned(steps=(3, 11)), ema=0.5, **changes)
    searching = result["skipped"] - 2  # fp16 also leaves steps out until the scale overflows nowhere
    assert searching == 0 or changes.get("precision") == "fp16"
    for name in ("model", "average"):
        assert all(torch.isfinite(x).all() for x in toy.weights(tmp_path)[name].values())
    assert math.isfinite(result["metrics"]["score"])
    lines = [line for line in log.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["skipped"] for line in lines] == [1 + searching, 0, 1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if "precision" not in changes:
        assert int(toy.weights(tmp_path)["model"]["1.num_batches_tracked"]) == 23


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    """Kills: a run that goes on for ever, a best.pt of NaNs, a message without the batch."""
    with pytest.raises(UserError, match=r"3 steps in a row, lastly step 9 \(epoch 2, training items \d+, \d+, \d+, \d+\)"):
        toy.run(tmp_path, task=Poisoned(steps=tuple(range(7, 25))), patience=2)
    for name in ("last.pt", "best.pt"):
        assert all(torch.isfinite(x).all() for x in toy.weights(tmp_path, name)["model"].values())
    assert toy.weights(tmp_path)["progress"]["step"] == 10


def test_bf16(tmp_path: Path) -> None:
    """Autocast is on: the result differs, the weights stay float32."""
    toy.run(tmp_path / "a", epochs=1)
    toy.run(tmp_path / "b", epochs=1, precision="bf16")
    a, b = (toy.weights(tmp_path / name)["model"]["0.weight"] for name in "ab")
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
