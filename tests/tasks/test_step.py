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
from torch.utils._python_dispatch import TorchDispatchMode

from arsam import ARSAM, reuse, sampling
from tasks import loading, log
from tasks.errors import UserError
from tasks.loading import Batches, Seeded
from tasks.state import State
from tasks.step import Step
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
    return torch.stack([data[key]["x"] for key in toy.keys(step)])


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
    """A NaN in the data of two steps. Kills: weights that take it in; a silent skip; lines without the signs."""
    result = toy.run(tmp_path, task=Poisoned(steps=(3, 11)), ema=0.5, **changes)
    searching = result["skipped"] - 2  # fp16 also leaves steps out until the scale overflows nowhere
    assert searching == 0 or changes.get("precision") == "fp16"
    for name in ("model", "average"):
        assert all(torch.isfinite(x).all() for x in toy.weights(tmp_path)[name].values())
    assert math.isfinite(result["metrics"]["score"])
    lines = [line for line in log.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["skipped"] for line in lines] == [1 + searching, 0, 1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)
    signs = {"rise", "psf_ratio", "cosine"}
    assert all(signs & line.keys() == (set() if changes == {"sharpness": None} else signs) for line in lines)
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


READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}
BUDGET = partial(ARSAM, rho=0.1, sampling=partial(sampling.Periodic, 2), reuse=partial(reuse.Decayed))  # type: ignore[arg-type]


class Counted(TorchDispatchMode):
    """Counts the calls that bring a number from a tensor to Python, and the norms of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in READS
        self.norms += "_foreach_norm" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sharpness", [None, BUDGET], ids=["baseline", "arsam"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 0), ("bf16", 0), ("fp16", 1)])
def test_reads_of_a_step(precision: Any, most: int, sharpness: Any) -> None:
    """With clipping and an average. Kills: a check of each pass, a loss or a scale that is read, an average that counts."""
    config = dataclasses.replace(
        toy.config, precision=precision, sharpness=sharpness, optimizer=partial(SGD, lr=1e-2), ema=0.9, clip_norm=1.0
    )
    torch.manual_seed(0)
    data, batches = Seeded(config.task.dataset("train"), 0), Batches(21, 4, 5, 0)
    state = State(config, batches, toy.CPU)
    step = Step(config, state)
    state.trained.train()
    steps = 0
    for epoch, indices in batches.after(0):
        batch = torch.utils.data.default_collate([data[epoch, index] for index in indices])
        state.set_rate()
        passes = state.progress.passes
        with Counted() as counted:
            step(batch)
        passes = state.progress.passes - passes
        assert counted.reads <= most, f"step {steps}: {counted.reads} reads"
        assert counted.norms <= passes or sharpness is not None  # that of clipping; an ascent has its own
        steps += 1
    assert steps == 25
    assert state.progress.passes > 25 or sharpness is None


def test_a_nan_found_late_leaves_the_run_as_if_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, generators too. Kills: a run that goes on from spoilt weights, a step that is left out twice."""
    task = Poisoned(steps=(3, 11))
    toy.run(tmp_path / "late", task=task, ema=0.5)
    assert "NaN or inf in steps 1 to 5; going back to step 0" in capsys.readouterr().err
    careful = Step.__init__

    def at_once(self: Step, config: Any, state: State) -> None:
        careful(self, config, state)
        self._careful = True

    monkeypatch.setattr(Step, "__init__", at_once)
    toy.run(tmp_path / "at once", task=task, ema=0.5)
    assert "going back" not in capsys.readouterr().err
    toy.assert_same(toy.weights(tmp_path / "late"), toy.weights(tmp_path / "at once"))
