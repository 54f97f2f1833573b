"""Two gloo ranks against one process: the same schedule, the same weights, and no hang when one of them fails."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from arsam import ARSAM, reuse, sampling
from arsam.integrations.checkpoint import OptimizerState
from tests.reference import counts

RANKS = 2
STEPS = 12
RHO = 0.1
SHARDED: dict[str, Callable[[], dict[str, Any]]] = {
    "decayed": dict,
    "orthogonal": lambda: {"reuse": reuse.Orthogonal()},
    "adaptive": lambda: {"adaptive": True, "sampling": sampling.Adaptive(window=4, blocks=2, warmup=2, monitor=3)},
    "gradient norm": lambda: {"sampling": sampling.GradientNorm(-1, 1, STEPS)},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The whole batch, or a rank's share of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return (x, y) if rank is None else (x[rank::RANKS], y[rank::RANKS])


def optimizer_of(model: nn.Module, seed: int = 0, **settings: Any) -> ARSAM:
    settings = {"sampling": sampling.Bernoulli(0.4, seed=seed), "reuse": reuse.Decayed(0.8, 3), **settings}
    return ARSAM(AdamW(model.parameters(), lr=0.01), rho=RHO, model=model, **settings)


def train(model: nn.Module, optimizer: ARSAM, data: tuple[Tensor, Tensor], steps: int = STEPS) -> list[Tensor]:
    x, y = data

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


class Masked(nn.Module):
    """Dropout that notes its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.masks = nn.Dropout(0.5), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(self.drop(torch.ones_like(x)).detach())
        return x * self.masks[-1]


def masks(rank: int, rule: sampling.Sampling, by_hand: bool) -> tuple[list[Tensor], Tensor]:
    """All masks of four steps, two of them ascents by Periodic(2), and what a rank draws after them."""
    masked = Masked()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), masked, nn.Linear(8, 3)).double())
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), model, rho=RHO, sampling=rule)
    x, y = batch(rank)
    torch.manual_seed(5 + rank)
    if not by_hand:
        train(model, optimizer, (x, y), 4)
    for _ in range(4 * by_hand):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if optimizer.due:
            with optimizer.perturb():
                (model(x) - y).square().mean().backward()
        optimizer.step()
    return masked.masks, torch.rand(3)


class Disagreeing(ARSAM):
    """The deliberately broken variant: each rank goes by its own seed."""

    def _agree(self) -> None:
        pass


def ddp_by_hand(rank: int) -> list[Tensor]:
    """The loop that owns its backward: two micro-batches, gradients reduced once per pass."""
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model)
    x, y = batch(rank)

    def backward() -> None:
        with model.no_sync():
            ((model(x[:2]) - y[:2]).square().mean() / 2).backward()
        ((model(x[2:]) - y[2:]).square().mean() / 2).backward()

    for _ in range(STEPS):
        optimizer.zero_grad()
        backward()
        if optimizer.due:
            with optimizer.perturb():
                backward()
        optimizer.step()
    return weights(model)


def shard(model: nn.Module) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    optimizer = optimizer_of(model, seed=rank)
    found["global"] = train(model, optimizer, batch(rank))
    found["stats"] = counts(optimizer)

    apart = Disagreeing(SGD(network().parameters(), lr=0.1), sampling=sampling.Bernoulli(0.5, seed=rank))
    together = ARSAM(SGD(network().parameters(), lr=0.1), sampling=sampling.Bernoulli(0.5, seed=rank))
    found["apart"], found["together"] = (
        [o.sampling.due(step, torch.zeros) for step in range(50)] for o in (apart, together)
    )  # fmt: skip

    model = DistributedDataParallel(network())
    found["per rank"] = train(model, optimizer_of(model, per_rank=True), batch(rank))
    found["by hand"] = ddp_by_hand(rank)
    try:
        optimizer_of(network(), per_rank=True)
    except ValueError as error:
        found["per rank refused"] = str(error)

    for by_hand in (False, True):
        found[f"masks {by_hand}"] = masks(rank, sampling.Periodic(2), by_hand)
        found[f"masks of the base {by_hand}"] = masks(rank, sampling.Never(), by_hand)

    for name, settings in SHARDED.items():
        model = shard(network())
        found[f"fsdp {name}"] = train(model, optimizer_of(model, **settings()), batch(rank))

    model = shard(network())
    optimizer = optimizer_of(model)
    train(model, optimizer, batch(rank), 7)
    dcp.save({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}, checkpoint_id=folder / "dcp")
    found["uninterrupted"] = train(model, optimizer, batch(rank), 5)
    found["resumed"] = train(*resumed(folder, shard(network())), batch(rank), 5)
    return found


def resumed(folder: Path, model: nn.Module) -> tuple[nn.Module, ARSAM]:
    optimizer = optimizer_of(model)
    state = model.state_dict()
    saved = {"model": state, "optimizer": OptimizerState(model, optimizer)}
    dcp.load(saved, checkpoint_id=folder / "dcp")
    model.load_state_dict(state)
    return model, optimizer


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.save(scenarios(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        mp.spawn(worker, args=(Path(name),), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        yield Path(name)


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> bool:
    return all(torch.allclose(x, y, atol=tolerance, rtol=0) for x, y in zip(a, b, strict=True))


def alone(**settings: Any) -> list[Tensor]:
    model = network()
    return train(model, optimizer_of(model, **settings), batch())


def test_two_ranks_equal_one_process(found: list[dict[str, Any]]) -> None:
    """Though they were given different seeds. Kills: no broadcast, a gradient kept as a view of DDP's bucket."""
    assert found[0]["stats"] == found[1]["stats"]
    assert 0 < found[0]["stats"]["ascents"] < STEPS
    for rank in found:
        assert close(rank["global"], alone())
    assert not close(found[0]["global"], alone(sampling=sampling.Never())), "the ascents must matter"


def test_ranks_decide_alike(found: list[dict[str, Any]]) -> None:
    """Kills: no broadcast. The broken variant shows what it guards against: ranks that wait for each other for ever."""
    assert found[0]["together"] == found[1]["together"]
    assert found[0]["apart"] != found[1]["apart"]


def test_per_rank_perturbation(found: list[dict[str, Any]]) -> None:
    """m-sharpness against plain loops. Kills: a synchronised first pass, a PSF against the rank's own gradient."""
    model = network()
    plain = AdamW(model.parameters(), lr=0.01)
    rule, kept, age = sampling.Bernoulli(0.4), None, 0

    def gradient(rank: int | None, at: list[Tensor] | None = None) -> list[Tensor]:
        x, y = batch(rank)
        parameters = list(model.parameters()) if at is None else at
        names = [n for n, _ in model.named_parameters()]
        output: Any = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return list(torch.autograd.grad((output - y).square().mean(), parameters))

    for step in range(STEPS):
        g = gradient(None)
        if rule.due(step, torch.zeros):
            g_s = [torch.zeros_like(x) for x in g]
            for rank in range(RANKS):
                own = gradient(rank)
                norm = torch.stack([x.square().sum() for x in own]).sum().sqrt()
                at = [(p + RHO * x / norm).detach().requires_grad_() for p, x in zip(model.parameters(), own, strict=True)]
                g_s = [s + x / RANKS for s, x in zip(g_s, gradient(rank, at), strict=True)]
            kept, age = [s - x for s, x in zip(g_s, g, strict=True)], 0
            g = g_s
        elif kept is not None:
            age += 1
            g = [x + 0.8**age * k for x, k in zip(g, kept, strict=True)] if age <= 3 else g
        for p, x in zip(model.parameters(), g, strict=True):
            p.grad = x
        plain.step()
    for rank in found:
        assert close(rank["per rank"], weights(model), 1e-10)
    assert not close(found[0]["per rank"], found[0]["global"], 1e-6)
    assert "DistributedDataParallel" in found[0]["per rank refused"]


def test_own_backward_with_accumulation(found: list[dict[str, Any]]) -> None:
    """Kills: a perturbation by the last micro-batch, a second pass over the last micro-batch only."""
    for rank in found:
        assert close(rank["by hand"], alone())


@pytest.mark.parametrize("by_hand", [False, True])
def test_dropout_on_every_rank(found: list[dict[str, Any]], by_hand: bool) -> None:
    """Equal masks in both passes, and each rank's are those without ARSAM. Kills: masks drawn anew, rank 0's masks for all."""
    for rank in found:
        drawn, after = rank[f"masks {by_hand}"]
        alone, after_alone = rank[f"masks of the base {by_hand}"]
        assert len(drawn) == 6 and torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[3], drawn[4])
        assert all(torch.equal(a, b) for a, b in zip([drawn[i] for i in (0, 2, 3, 5)], alone, strict=True))
        assert torch.equal(after, after_alone)
    assert not torch.equal(found[0][f"masks {by_hand}"][0][0], found[1][f"masks {by_hand}"][0][0])


@pytest.mark.parametrize("name", SHARDED)
def test_fully_sharded(found: list[dict[str, Any]], name: str) -> None:
    """Kills: a norm or an inner product over one shard."""
    expected = alone(**SHARDED[name]())
    for rank in found:
        assert close(rank[f"fsdp {name}"], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so it is: the second load is one process's
def test_distributed_checkpoint(found: list[dict[str, Any]], folder: Path) -> None:
    """Saved by two sharded ranks, loaded by two and by one that is not sharded. Kills: no PSF, schedule or momentum saved."""
    for rank in found:
        assert close(rank["resumed"], rank["uninterrupted"], 0.0)
    assert close(train(*resumed(folder, network()), batch(), 5), found[0]["uninterrupted"])


FAILING = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from arsam import ARSAM, sampling
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = DistributedDataParallel(nn.Linear(4, 4))
optimizer = ARSAM(torch.optim.SGD(model.parameters(), lr=0.1), sampling=sampling.Always(), model=model)
passes = 0
def closure():
    global passes
    passes += 1
    if rank == 1 and passes == 4:
        raise RuntimeError("a broken picture")
    optimizer.zero_grad()
    loss = model(torch.randn(2, 4)).square().mean()
    loss.backward()
    return loss
for _ in range(5):
    optimizer.step(closure)
"""


def test_failure_on_one_rank_ends_all(tmp_path: Path) -> None:
    """In a second pass. Kills: a swallowed exception, after which the other rank waits for ever."""
    command = [sys.executable, "-c", FAILING]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    deadline = time.monotonic() + 60
    try:
        errors = [rank.communicate(timeout=max(deadline - time.monotonic(), 1))[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode for rank in ranks)
    assert "a broken picture" in errors[1]
    assert "Error" in errors[0]
