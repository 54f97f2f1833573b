"""The example loop of Accelerate against a plain loop."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_

pytest.importorskip("accelerate", reason="accelerate is not installed; pip install '.[loops]'")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

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


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: an example that does not run as it stands."""
    EXAMPLE["main"]()
    assert "'ascents': " in capsys.readouterr().out
