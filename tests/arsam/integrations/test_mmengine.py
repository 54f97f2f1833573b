"""The wrappers of mmengine against the same training in a plain loop, and what they guard against, broken on purpose."""

from __future__ import annotations

import copy
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling, scaled_step
from tests.reference import counts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's newer ways, at mmengine's older ones
    pytest.importorskip("mmengine", reason="mmengine is not installed; make test-mmpose")
    from mmengine.dataset import pseudo_collate
    from mmengine.model import BaseModel, MMDistributedDataParallel
    from mmengine.optim import AmpOptimWrapper, LinearParamScheduler
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    from arsam.integrations.mmengine import ARSAMOptimWrapper

pytestmark = [pytest.mark.mmpose, pytest.mark.filterwarnings("default")]

EVERY = {"type": "Periodic", "every": 3, "offset": 1}
STEPS = 11


class Toy(BaseModel):
    """A network with BatchNorm whose forward passes are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.forwards = 0

    def forward(self, inputs: Any, labels: Any, mode: str = "tensor") -> Any:
        self.forwards += 1
        logits = self.net(torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs)
        labels = torch.as_tensor(labels)
        return {"loss": nn.functional.cross_entropy(logits, labels)} if mode == "loss" else logits


def batches(count: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"inputs": torch.randn(6, 4, generator=g), "labels": torch.randint(3, (6,), generator=g)} for _ in range(count)]


def build(model: nn.Module, wrapper: str | type = "ARSAMOptimWrapper", **settings: Any) -> Any:
    settings = {"rho": 0.1, "sampling": EVERY, "reuse": {"type": "Decayed", "beta": 0.5, "horizon": 2}, **settings}
    return OPTIM_WRAPPERS.build(dict(type=wrapper, optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9), **settings))


def clipping(model: nn.Module, norm: float) -> Callable[..., None]:
    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    return clip


def by_hand(count: int, accumulate: int = 1, clip: float | None = None) -> tuple[Toy, ARSAM]:
    """The same training by ARSAM's own step; the plain loop that the wrapper has to equal."""
    model = Toy()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    if clip is not None:
        base.register_step_pre_hook(clipping(model, clip))
    optimizer = ARSAM(base, rho=0.1, sampling=sampling.Periodic(3, 1), reuse=reuse.Decayed(0.5, 2), model=model)
    data = batches(count)
    for i in range(0, count, accumulate):

        def closure(some: list[dict[str, Tensor]] = data[i : i + accumulate]) -> None:
            optimizer.zero_grad()
            for batch in some:
                (model(**batch, mode="loss")["loss"] / len(some)).backward()

        optimizer.step(closure)
    return model, optimizer


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def trained(count: int = STEPS, wrapper: str | type = "ARSAMOptimWrapper", **settings: Any) -> tuple[Toy, Any]:
    model = Toy()
    optim_wrapper = build(model, wrapper, **settings)
    optim_wrapper.initialize_count_status(model, 0, count)
    for batch in batches(count):
        model.train_step(batch, optim_wrapper)
    return model, optim_wrapper


def test_equals_the_plain_loop() -> None:
    """Kills: a second forward on every step or on none, the loss of the second pass doubled."""
    model, wrapper = trained()
    other, optimizer = by_hand(STEPS)
    assert_equal(model, other)
    assert wrapper.optimizer.stats == optimizer.stats
    assert model.forwards == STEPS + 4 == STEPS + wrapper.optimizer.stats["ascents"]
    assert wrapper.message_hub.get_scalar("train/ascents").current() == 4


def test_one_decision_for_an_update_of_many_batches() -> None:
    """Kills: a decision per batch, a second pass over the last batch alone, the wrong factor on a short last update."""
    model, wrapper = trained(11, accumulative_counts=3)  # updates of 3, 3, 3 and 2 batches; the second one ascends
    other, optimizer = by_hand(11, accumulate=3)
    assert_equal(model, other)
    assert counts(wrapper.optimizer) == counts(optimizer) == {"steps": 4, "ascents": 1, "reuses": 2, "passes_per_step": 1.25}
    assert model.forwards == 11 + 3


class PerBatch(ARSAMOptimWrapper):
    """Broken: asks after every batch whether an ascent is due, and runs it for that batch."""

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss, **kwargs)
        if self._calls and self.optimizer.due and not self.optimizer._perturbed:
            with self.optimizer.perturb():
                self._second_pass(self._calls[-1:])

    def step(self, **kwargs: Any) -> None:
        self._calls = []
        self._update(**kwargs)


def test_a_decision_per_batch_would_do_too_much() -> None:
    """What the test above kills: as many passes here, over other batches, and other weights."""
    model, wrapper = trained(11, PerBatch, accumulative_counts=3)
    other, _ = by_hand(11, accumulate=3)
    assert not torch.equal(model.net[0].weight, other.net[0].weight)


class Thawed(ARSAMOptimWrapper):
    """Broken: does not tell ARSAM whose statistics have to stand still."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model):
            yield
        self.optimizer.model = None

    def _second_pass(self, calls: Any) -> None:
        self.optimizer.model = self.model
        super()._second_pass(calls)
        self.optimizer.model = None


def test_batchnorm_stands_still() -> None:
    """Kills: a wrapper that does not freeze; it counts the batches of ascents twice."""
    model, _ = trained()
    assert model.net[1].num_batches_tracked == STEPS
    broken = Toy()
    wrapper = build(broken, Thawed)
    wrapper.model = broken
    for batch in batches(STEPS):
        broken.train_step(batch, wrapper)
    assert broken.net[1].num_batches_tracked == STEPS + 4


def test_clips_what_the_update_reads() -> None:
    """Kills: clipping g before PSF is mixed in, clipping each pass."""
    model, wrapper = trained(clip_grad={"max_norm": 0.2})
    other, _ = by_hand(STEPS, clip=0.2)
    assert_equal(model, other)
    unclipped, _ = by_hand(STEPS)
    assert not torch.equal(model.net[0].weight, unclipped.net[0].weight)
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() > 0


@pytest.fixture
def scaler_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's AmpOptimWrapper wants a GPU; the arithmetic does not."""
    module = sys.modules[AmpOptimWrapper.__module__]
    monkeypatch.setattr(module, "is_cuda_available", lambda: True)
    monkeypatch.setattr(module, "GradScaler", partial(torch.amp.GradScaler, "cpu"))


AMP: dict[str, Any] = {"dtype": "bfloat16", "loss_scale": 2.0**14, "accumulative_counts": 2, "clip_grad": {"max_norm": 0.2}}


@pytest.mark.usefixtures("scaler_on_cpu")
def test_mixed_precision_equals_the_plain_loop() -> None:
    """Kills: a second pass in float32 or with another scale, clipping of scaled gradients, a PSF in units of the scale."""
    model, wrapper = trained(24, "ARSAMAmpOptimWrapper", **AMP)
    other = Toy()
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    base.register_step_pre_hook(clipping(other, 0.2))
    optimizer = ARSAM(base, rho=0.1, sampling=sampling.Periodic(3, 1), reuse=reuse.Decayed(0.5, 2), model=other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    data = batches(24)
    for pair in zip(data[::2], data[1::2], strict=True):

        def closure(pair: Any = pair) -> None:
            optimizer.zero_grad()
            for batch in pair:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = other(**batch, mode="loss")["loss"]
                scaler.scale(loss / 2).backward()

        scaled_step(optimizer, closure, scaler)
    assert_equal(model, other)
    assert counts(wrapper.optimizer) == counts(optimizer) and optimizer.stats["ascents"] == 4
    small, _ = trained(24, "ARSAMAmpOptimWrapper", **{**AMP, "loss_scale": 1.0})
    assert_equal(model, small)  # the scale is a power of two
    full, _ = trained(24, **{name: AMP[name] for name in ("accumulative_counts", "clip_grad")})
    assert not torch.equal(full.net[0].weight, model.net[0].weight)


@pytest.mark.usefixtures("scaler_on_cpu")
def test_mixed_precision_leaves_out_and_resumes() -> None:
    """Kills: a schedule that goes on over a step left out, a scale that is not saved."""
    model = Toy()
    wrapper = build(model, "ARSAMAmpOptimWrapper", dtype="bfloat16", loss_scale={"init_scale": 2.0**127, "growth_interval": 3})
    before = model.net[0].weight.detach().clone()
    data = batches(12)
    model.train_step({**data[0], "inputs": 1e4 * data[0]["inputs"]}, wrapper)
    assert wrapper.optimizer.stats["steps"] == 0 and torch.equal(model.net[0].weight, before)
    assert wrapper.loss_scaler.get_scale() == 2.0**126
    wrapper.loss_scaler.update(2.0**10)
    for batch in data[:6]:
        model.train_step(batch, wrapper)
    other = copy.deepcopy(model)
    resumed = build(other, "ARSAMAmpOptimWrapper", dtype="bfloat16")
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert resumed.loss_scaler.get_scale() == wrapper.loss_scaler.get_scale() > 2.0**10
    for batch in data[6:]:
        model.train_step(batch, wrapper)
        other.train_step(batch, resumed)
    assert_equal(model, other)
    assert wrapper.optimizer.stats["steps"] == 12


def test_rules_by_name() -> None:
    """Kills: a typo that falls back to the default, a name from elsewhere in the module."""
    wrapper = build(Toy(), sampling={"type": "Bernoulli", "p": 0.3, "seed": 4}, reuse={"type": "Orthogonal"})
    assert isinstance(wrapper.optimizer.sampling, sampling.Bernoulli) and wrapper.optimizer.sampling.seed == 4
    assert isinstance(wrapper.optimizer.reuse, reuse.Orthogonal)
    default = build(Toy(), sampling=None, reuse=None).optimizer
    assert isinstance(default.sampling, sampling.Budget) and default.sampling.spacing == 5
    assert build(Toy(), sampling=None, passes=1.05).optimizer.sampling.spacing == 20
    for name in ("Perodic", "Sampling", "deque", "_Stateless", None):
        with pytest.raises(ValueError, match="type must be one of Adaptive, Always, Bernoulli"):
            build(Toy(), sampling={"type": name})


def test_says_what_it_cannot_repeat() -> None:
    """Kills: a step that silently goes without its ascent, or repeats half a loss."""
    model = Toy()
    wrapper = build(model, sampling={"type": "Always"})
    batch = batches(1)[0]
    with pytest.raises(RuntimeError, match="optim_context"):
        wrapper.update_params(model(**batch, mode="loss")["loss"])
    wrapper = build(model, sampling={"type": "Always"})
    with wrapper.optim_context(model):
        loss = sum(model(**batch, mode="loss")["loss"] for _ in range(2))
    with pytest.raises(RuntimeError, match="once for every backward pass"):
        wrapper.update_params(loss)


def test_mmengine_schedules_rho() -> None:
    """Kills: rho in the wrapper instead of the groups."""
    model = Toy()
    wrapper = build(model, rho=0.4)
    scheduler = LinearParamScheduler(wrapper, param_name="sam_rho", start_factor=0.5, end_factor=1.0, end=3)
    seen = []
    for batch in batches(4):
        seen.append(wrapper.optimizer.param_groups[0]["sam_rho"])
        model.train_step(batch, wrapper)
        scheduler.step()
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.4])
    assert wrapper.message_hub.get_scalar("train/rho").current() == pytest.approx(0.4)


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sixty points, in memory."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        return {"inputs": torch.randn(4, generator=g), "labels": i % 3}


def runner(folder: Path, epochs: int, name: str, **settings: Any) -> tuple[Any, list[float]]:
    """A whole run of mmengine's; the loss of each of its steps."""
    losses: list[float] = []
    run = Runner(
        model=Toy(),
        work_dir=str(folder),
        train_dataloader={
            "dataset": Samples(),
            "batch_size": 6,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "collate_fn": pseudo_collate,
        },
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={
            "type": "ARSAMOptimWrapper",
            "rho": 0.1,
            "sampling": {"type": "Adaptive", "window": 10, "initial": 3},
            "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
            "paramwise_cfg": {"bias_decay_mult": 0.0},
        },
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.1, "end": 25, "by_epoch": False},
            {"type": "LinearParamScheduler", "param_name": "sam_rho", "start_factor": 0.1, "end": 25, "by_epoch": False},
        ],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        randomness={"seed": 3},
        log_level="ERROR",
        experiment_name=name,
        default_scope="mmengine",
        **settings,
    )
    step = run.model.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        log = step(*args, **kwargs)
        losses.append(float(log["loss"]))
        return log

    run.model.train_step = train_step
    run.train()
    return run, losses


def test_runner_trains_and_resumes(tmp_path: Path) -> None:
    """Kills: a state without PSF, queues or counters; a checkpoint that torch.load refuses."""
    whole, losses = runner(tmp_path / "whole", 4, "whole")
    stats = whole.optim_wrapper.optimizer.stats
    assert stats["steps"] == 40 and stats["ascents"] == 12  # 3 in each window of 10
    assert whole.model.forwards == 52
    _, first = runner(tmp_path / "half", 4, "half", resume=True, load_from=str(tmp_path / "whole" / "epoch_2.pth"))
    assert first == losses[20:]


def test_runner_state_matters(tmp_path: Path) -> None:
    """The twin of the test above, broken: the weights and the base optimizer's state alone do not continue the run."""
    _, losses = runner(tmp_path / "whole", 4, "whole2")
    file = tmp_path / "whole" / "epoch_2.pth"
    checkpoint = torch.load(file)
    assert checkpoint["optimizer"]["arsam"]["kept"]
    checkpoint["optimizer"]["arsam"]["kept"] = {}
    torch.save(checkpoint, tmp_path / "broken.pth")
    _, rest = runner(tmp_path / "half", 4, "half2", resume=True, load_from=str(tmp_path / "broken.pth"))
    assert rest[0] == losses[20] and rest != losses[20:]


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: half of each batch."""
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = Toy()
    model.net[1] = nn.Identity()  # BatchNorm sees half a batch
    ddp = MMDistributedDataParallel(model)
    wrapper = build(ddp, accumulative_counts=2)
    wrapper.initialize_count_status(ddp, 0, 12)
    for batch in batches(12):
        half = {name: x[rank * 3 : rank * 3 + 3] for name, x in batch.items()}
        ddp.train_step(half, wrapper)
    torch.save({"state": model.state_dict(), "forwards": model.forwards}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed(tmp_path: Path) -> None:
    """Kills: a second pass that goes past DDP's reducer: ranks would drift apart."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a["forwards"] == b["forwards"] == 12 + 2 * 2  # two of six updates ascend
    model = Toy()
    model.net[1] = nn.Identity()
    wrapper = build(model, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 12)
    for batch in batches(12):
        model.train_step(batch, wrapper)
    for name, x in model.state_dict().items():
        assert torch.equal(a["state"][name], b["state"][name])
        torch.testing.assert_close(a["state"][name], x)
