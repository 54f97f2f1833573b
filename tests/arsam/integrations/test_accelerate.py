"""The example loop of Accelerate against a plain loop."""

from __future__ import annotations

import os
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from arsam import ARSAM

pytest.importorskip("accelerate", reason="accelerate is not installed; pip install '.[loops]'")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)

from tests.reference import counts

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "accelerate_loop.py"))

pytestmark = pytest.mark.filterwarnings("default")

SCALE = 2.0**10


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Accelerate keeps its settings in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Counted(nn.Sequential):
    """Counts its forward passes."""

    passes = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(inputs)


def fp16_on_cpu(accelerator: Accelerator) -> None:
    """Accelerate wants a GPU for fp16; the arithmetic does not."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = GradScaler("cpu", init_scale=SCALE)


def network() -> Counted:
    return Counted(*EXAMPLE["network"]())


def trained(accumulate: int, clip: float | None, precision: str) -> tuple[Counted, Any]:
    mixed = "no" if precision == "no" else "bf16"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=mixed)
    if precision == "fp16":
        fp16_on_cpu(accelerator)
    model = network()
    optimizer = EXAMPLE["optimizer_for"](model)
    EXAMPLE["train"](accelerator, model, optimizer, EXAMPLE["loader"](), clip)
    return model, optimizer


def by_hand(accumulate: int, clip: float | None, precision: str) -> tuple[Counted, Any]:
    model = network()
    optimizer = EXAMPLE["optimizer_for"](model)
    data = list(EXAMPLE["loader"]())
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=precision == "fp16")
    dtype = torch.half if precision == "fp16" else torch.bfloat16

    def backward(some: list[Any]) -> None:
        for inputs, labels in some:
            with torch.autocast("cpu", dtype, enabled=precision != "no"):
                loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss / accumulate).backward()  # type: ignore[union-attr]

    for i in range(0, len(data), accumulate):
        optimizer.zero_grad()
        backward(data[i : i + accumulate])
        if optimizer.due:
            with optimizer.perturb(scaler):
                backward(data[i : i + accumulate])
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), clip or torch.inf)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (4, None), (4, 0.1)])
def test_equals_the_plain_loop(accumulate: int, clip: float | None, precision: str) -> None:
    """Kills: an ascent over the last batch alone, one for each batch, scaled vectors that outlive the scale."""
    model, optimizer = trained(accumulate, clip, precision)
    other, plain = by_hand(accumulate, clip, precision)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert counts(optimizer) == counts(plain)
    steps, ascents = optimizer.stats["steps"], optimizer.stats["ascents"]
    assert (steps, ascents) == ((28, 6) if accumulate == 1 else (7, 2))
    assert model.passes == accumulate * (steps + ascents)


def test_decided_for_each_batch_it_goes_wrong() -> None:
    """The broken variant: `perturb` after each batch clears what the batches before it have accumulated."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = network()
    prepared, optimizer, batches = accelerator.prepare(model, EXAMPLE["optimizer_for"](model), EXAMPLE["loader"]())
    for inputs, labels in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(inputs), labels))
            if optimizer.optimizer.due:
                with optimizer.optimizer.perturb():
                    accelerator.backward(nn.functional.cross_entropy(prepared(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    other, plain = by_hand(4, None, "no")
    assert counts(optimizer.optimizer) == counts(plain)
    assert not torch.allclose(model[0].weight, other[0].weight, atol=1e-3)


def test_a_step_without_the_second_pass_is_refused() -> None:
    """Kills: a prepared optimizer that hides that an ascent was due."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(m := network(), EXAMPLE["optimizer_for"](m), EXAMPLE["loader"]())
    inputs, labels = next(iter(batches))
    accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
    with pytest.raises(RuntimeError, match="an ascent is due"):
        optimizer.step()


def sharded(rank: int, ranks: int, port: int, folder: str) -> None:
    """Save by accelerate's own functions for FSDP2, load into what is built anew, and go on as the uninterrupted run does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FSDP_VERSION": "2"}
    torch.set_num_threads(1)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="NO_WRAP")
    accelerator = Accelerator(cpu=True)

    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        accelerator.state.distributed_type = DistributedType.FSDP  # accelerate wants a GPU for it; the arithmetic does not
        accelerator.state.fsdp_plugin = plugin
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        accelerator._models.clear()
        prepared = accelerator.prepare(model, ARSAM(torch.optim.AdamW(model.parameters(), lr=1e-2), model, rho=0.1, passes=1.3))
        assert all(isinstance(p, DTensor) for p in prepared[0].parameters())
        return prepared

    def train(model: Any, optimizer: Any, steps: range) -> list[torch.Tensor]:
        for step in steps:
            inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(inputs).square().mean())
            if optimizer.optimizer.due:
                with optimizer.optimizer.perturb():
                    accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return [p.full_tensor().detach() for p in model.parameters()]

    model, optimizer = build()
    train(model, optimizer, range(5))
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    whole = train(model, optimizer, range(5, 11))
    other, fresh = build()
    load_fsdp_model(plugin, accelerator, other, folder)
    load_fsdp_optimizer(plugin, accelerator, fresh, other, folder)
    assert counts(fresh.optimizer)["steps"] == 5 and counts(fresh.optimizer)["ascents"] == 2
    for x, y in zip(train(other, fresh, range(5, 11)), whole, strict=True):
        assert torch.equal(x, y)
    assert counts(fresh.optimizer) == counts(optimizer.optimizer)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fsdp2_saves_and_loads(ranks: int, tmp_path: Path) -> None:
    """Kills: a PSF or a schedule that accelerate's own checkpoint loses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(sharded, args=(ranks, port, str(tmp_path)), nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: an example that does not run as it stands."""
    EXAMPLE["main"]()
    assert "'ascents': " in capsys.readouterr().out
