"""The loop: resume, order, records, clipping, averaging, and the same loop for every optimizer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling
from tasks import checkpoint, engine, loading, log, schedule
from tasks.errors import UserError
from tests.tasks import toy

CPU = torch.device("cpu")
FILES = {"run.json", "metrics.jsonl", "last.pt", "best.pt", "result.json", "curves.png"}


def run(out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return engine.train(dataclasses.replace(toy.config, **changes), out, device=CPU, resume=resume, name="toy")


def weights(out: Path, name: str = "last.pt") -> dict[str, Any]:
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


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def test_files_and_result(tmp_path: Path) -> None:
    """Every file and field of the contract."""
    result = run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result) == {
        "task", "metrics", "steps", "ascents", "passes_per_step", "train_seconds", "images_per_second", "peak_memory_mb",
        "seed", "config",
    }  # fmt: skip
    assert result["steps"] == 25
    assert result["passes_per_step"] == 1 + result["ascents"] / 25
    assert result["ascents"] >= 5 + 3, "an epoch of warm-up, and the quota of the windows"
    assert result["peak_memory_mb"] > 10
    record = json.loads((tmp_path / "run.json").read_text())
    assert {"config", "versions", "commit", "device", "command"} <= record.keys()
    assert record["config"]["sharpness"]["sampling"]["warmup"] == "Epochs(1)"
    lines = log.read(tmp_path / "metrics.jsonl")
    assert [(line["epoch"], "loss" in line) for line in lines] == [(e, loss) for e in range(1, 6) for loss in (True, False)]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_same_seed_same_run_whatever_the_workers(tmp_path: Path) -> None:
    """Augmentation follows (seed, epoch, index). Kills: randomness that depends on the process that loads."""
    for name, changes in (("a", {}), ("b", {"num_workers": 2}), ("c", {"seed": 1})):
        run(tmp_path / name, **changes)
    a, b, c = (weights(tmp_path / name)["model"] for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["0.weight"], c["0.weight"])


@pytest.mark.parametrize("changes", [{}, {"sharpness": None, "ema": 0.9, "clip_norm": 0.5}], ids=["arsam", "baseline"])
@pytest.mark.parametrize("stop", [7, 10])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path: Path, stop: int, changes: dict[str, Any]) -> None:
    """In the midst of an epoch and at its end. Kills: order, noise, schedule, EMA, loss sum or RNG not restored."""
    expected = run(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task=Interrupting(stop), **changes)
    assert weights(tmp_path / "cut")["progress"]["step"] == stop
    saved = weights(tmp_path / "cut")
    saved["config"]["task"] = engine.describe(toy.config.task)
    checkpoint.save(tmp_path / "cut" / "last.pt", saved)
    result = run(tmp_path / "cut", resume=True, **changes)
    for name in ("last.pt", "best.pt"):
        a, b = weights(tmp_path / "whole", name), weights(tmp_path / "cut", name)
        assert_same({**a, "config": 0}, {**b, "config": 0})
    timing = {"train_seconds", "images_per_second", "peak_memory_mb"}
    assert {k: v for k, v in result.items() if k not in timing} == {k: v for k, v in expected.items() if k not in timing}
    lines = [untimed(log.read(tmp_path / name / "metrics.jsonl")) for name in ("whole", "cut")]
    assert lines[0] == lines[1]


class Interrupting(toy.Toy):
    """Sends SIGINT to its own process in the first pass of a step."""

    def __init__(self, stop: int) -> None:
        super().__init__()
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "seen", [])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The toy's, and the signal."""
        seen: list[float] = self.__dict__["seen"]
        if (number := float(batch["x"][0, 0])) not in seen:
            seen.append(number)
            if len(seen) == self.__dict__["stop"]:
                os.kill(os.getpid(), signal.SIGINT)
        return super().loss(model, batch)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """The result is written again, the same."""
    first = run(tmp_path)
    before = weights(tmp_path)
    again = run(tmp_path, resume=True)
    assert_same(before, weights(tmp_path))
    assert again["metrics"] == first["metrics"]


def test_resume_with_another_config(tmp_path: Path) -> None:
    """Refused, with what differs; the number of workers may differ."""
    run(tmp_path, epochs=1)
    run(tmp_path, epochs=1, num_workers=1, resume=True)
    with pytest.raises(UserError, match=r"last\.pt: made with another config: batch_size was 4, is 5"):
        run(tmp_path, epochs=1, batch_size=5, resume=True)
    with pytest.raises(UserError, match="no such checkpoint"):
        run(tmp_path / "nowhere", resume=True)


def test_the_baseline_is_torch_alone(tmp_path: Path) -> None:
    """The loop adds nothing: a few lines of plain torch give the same weights. Kills: an extra step, a shifted schedule."""
    config = dataclasses.replace(toy.config, sharpness=None, epochs=2)
    engine.train(config, tmp_path, device=CPU)
    torch.manual_seed(config.seed)
    data, batches = loading.Seeded(config.task.dataset("train"), 0), loading.Batches(21, 4, 2, 0)
    model = config.task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, keys in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule.cosine(step, 10, warmup=5)
        batch = torch.utils.data.default_collate([data[k] for k in keys])
        optimizer.zero_grad()
        config.task.loss(model, batch).backward()
        optimizer.step()
    assert_same(dict(weights(tmp_path)["model"]), dict(model.state_dict()))


@dataclasses.dataclass(frozen=True)
class Poisoned(toy.Toy):
    """Gives NaN inputs on some steps, counted by the first passes over new data."""

    steps: tuple[int, ...] = ()

    def build(self) -> Any:
        """With a memory of the batches seen."""
        model = super().build()
        object.__setattr__(model, "seen", [])
        return model

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Toy's, of a poisoned copy."""
        if not model.seen or not torch.equal(model.seen[-1], batch["x"]):
            model.seen.append(batch["x"])
        poison = float("nan") if len(model.seen) - 1 in self.steps else 0.0
        return super().loss(model, {**batch, "x": batch["x"] + poison})


def test_batches() -> None:
    """Each item once per epoch, in an order of its own, a remainder left over; a start in the midst goes on the same."""
    whole = list(loading.Batches(21, 4, 3, seed=5))
    assert len(whole) == 15
    for epoch in range(3):
        keys = [key for batch in whole[5 * epoch : 5 * epoch + 5] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys}) == 20
    assert [i for _, i in whole[0]] != [i for _, i in whole[5]]
    late = loading.Batches(21, 4, 3, seed=5)
    late.start = 7
    assert list(late) == whole[7:]
    assert whole[7] == late.keys(7)
    assert [len(b) for b in loading.Batches(3, 8, 2, seed=0)] == [3, 3]


def test_items_leave_the_generators_alone() -> None:
    """Loading an item in this process must not disturb the run's own random numbers."""
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    _ = loading.Seeded(toy.Points(5), 0)[0, 1]
    assert torch.equal(torch.rand(1), expected)


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

    run(out, optimizer=build, clip_norm=0.01, **changes)
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
        run(tmp_path / str(parts), accumulate=parts, **changes)
    models = [weights(tmp_path / str(parts))["model"] for parts in (1, 3)]
    torch.testing.assert_close(models[0], models[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"sharpness": None}, {"precision": "fp16"}], ids=["arsam", "baseline", "fp16"])
def test_nan_batches_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A NaN in the data of two steps. Kills: weights, averages or running statistics that take it in; a silent skip."""
    result = run(tmp_path, task=Poisoned(steps=(3, 11)), ema=0.5, **changes)
    searching = result["skipped"] - 2  # fp16 also leaves steps out until the scale overflows nowhere
    assert searching == 0 or changes.get("precision") == "fp16"
    for name in ("model", "average"):
        assert all(torch.isfinite(x).all() for x in weights(tmp_path)[name].values())
    assert math.isfinite(result["metrics"]["score"])
    lines = [line for line in log.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["skipped"] for line in lines] == [1 + searching, 0, 1, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in lines)
    if "precision" not in changes:
        assert int(weights(tmp_path)["model"]["1.num_batches_tracked"]) == 23


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    """Kills: a run that goes on for ever, a best.pt of NaNs, a message without the batch."""
    with pytest.raises(UserError, match=r"3 steps in a row, lastly step 9 \(epoch 2, training items \d+, \d+, \d+, \d+\)"):
        run(tmp_path, task=Poisoned(steps=tuple(range(7, 25))), patience=2)
    for name in ("last.pt", "best.pt"):
        assert all(torch.isfinite(x).all() for x in weights(tmp_path, name)["model"].values())
    assert weights(tmp_path)["progress"]["step"] == 10


def test_total_steps_reach_the_rules() -> None:
    """Tail and GradientNorm are given the run's length, warm-ups in epochs become steps, reuse is built."""
    for rule in (partial(sampling.Tail, 0.2), partial(sampling.GradientNorm, 1, -1)):
        config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, sampling=rule))  # type: ignore[arg-type]
        optimizer = engine.build_optimizer(config, config.task.build(), 7)
        assert optimizer.sampling.total_steps == 35  # type: ignore[attr-defined]
    optimizer = engine.build_optimizer(toy.config, toy.config.task.build(), 7)
    assert optimizer.sampling.warmup == 7  # type: ignore[attr-defined]
    config = dataclasses.replace(toy.config, sharpness=partial(ARSAM, reuse=partial(reuse.Decayed, horizon=9)))  # type: ignore[arg-type]
    assert engine.build_optimizer(config, config.task.build(), 7).reuse.horizon == 9  # type: ignore[attr-defined]


def test_average_is_what_is_evaluated(tmp_path: Path) -> None:
    """EMA weights are saved, evaluated, and preferred when a checkpoint is loaded."""
    result = run(tmp_path, ema=0.5, epochs=2)
    saved = weights(tmp_path)
    assert not torch.equal(saved["average"]["0.weight"], saved["model"]["0.weight"])
    model = toy.config.task.build()
    checkpoint.load_weights(model, tmp_path / "last.pt")
    assert torch.equal(model[0].weight, saved["average"]["0.weight"])  # type: ignore[index]
    assert engine.evaluate(toy.config, model, CPU) == result["metrics"]


def test_best_is_the_best(tmp_path: Path) -> None:
    """best.pt is of the epoch with the highest metric."""
    run(tmp_path)
    scores = {line["epoch"]: line["metrics"]["score"] for line in log.read(tmp_path / "metrics.jsonl") if "metrics" in line}
    best = max(scores, key=lambda e: scores[e])
    assert weights(tmp_path, "best.pt")["progress"]["step"] == 5 * best
    assert weights(tmp_path)["progress"]["best"] == scores[best]


def test_evaluation_every_n_epochs(tmp_path: Path) -> None:
    """And at the end."""
    run(tmp_path, eval_every=3)
    assert [line["epoch"] for line in log.read(tmp_path / "metrics.jsonl") if "metrics" in line] == [3, 5]


def test_bf16(tmp_path: Path) -> None:
    """Autocast is on: the result differs, the weights stay float32."""
    run(tmp_path / "a", epochs=1)
    run(tmp_path / "b", epochs=1, precision="bf16")
    a, b = (weights(tmp_path / name)["model"]["0.weight"] for name in "ab")
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Torn, of another kind, or of another model: one error that names the file."""
    run(tmp_path, epochs=1)
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "torn.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"torn\.pt: not a readable checkpoint"):
            checkpoint.load(tmp_path / "torn.pt")
    with pytest.raises(UserError, match=r"last\.pt: does not fit the model .*size mismatch for 0\.weight"):
        checkpoint.load_weights(toy.Toy(width=5).build(), tmp_path / "last.pt")


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/arsam-bomb",)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """weights_only."""
    marker = Path("/tmp/arsam-bomb")
    marker.unlink(missing_ok=True)
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert not marker.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Kills: writing in place."""
    checkpoint.save(tmp_path / "a.pt", {"x": torch.ones(2)})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "a.pt", {"x": threading.Lock()})
    assert torch.equal(checkpoint.load(tmp_path / "a.pt")["x"], torch.ones(2))


def test_schedules() -> None:
    """The ends, the warm-up and the milestones."""
    assert schedule.cosine(0, 100) == 1.0
    assert schedule.cosine(50, 100) == pytest.approx(0.5)
    assert schedule.cosine(100, 100, floor=0.1) == pytest.approx(0.1)
    assert [schedule.cosine(t, 100, warmup=3, start=0.2) for t in range(4)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    factors = [schedule.multistep(t, 100, milestones=(5, 8), gamma=0.1, warmup=2, start=0.5) for t in (0, 1, 4, 5, 7, 8)]
    assert factors == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01])


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
