"""Lightning's Fabric, whose wrapper of an optimizer pretends to be of our class, against a plain loop."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from arsam import ARSAM, scaled_step
from tests.reference import counts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="lightning is not installed; pip install '.[loops]'")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "lightning_trainer.py"))

pytestmark = pytest.mark.filterwarnings("default")

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return EXAMPLE["Digits"]().net


def arsam_of(model: nn.Module) -> ARSAM:
    return ARSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)


def fabric_for(precision: str) -> Fabric:
    if precision != "16-mixed":
        return Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=GradScaler("cpu", init_scale=2.0**10))
    return Fabric(accelerator="cpu", devices=1, plugins=[plugin])


def by_hand(precision: str) -> tuple[nn.Module, ARSAM]:
    model = network()
    optimizer = arsam_of(model)
    scaler = GradScaler("cpu", init_scale=2.0**10, enabled=precision == "16-mixed")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.half}[precision]
    for inputs, labels in EXAMPLE["loader"]():

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=precision != "32-true"):
                logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()  # type: ignore[union-attr]
            return loss

        scaled_step(optimizer, closure, scaler)
    return model, optimizer


@pytest.mark.parametrize("how", ["perturb", "perturb of the wrapper", "closure"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_the_plain_loop(precision: str, how: str) -> None:
    """Kills: an ascent that stays on the wrapper, a scaled PSF, statistics that move."""
    if (precision, how) == ("16-mixed", "closure"):
        pytest.skip("Fabric hands the closure to the GradScaler, which takes none")
    fabric = fabric_for(precision)
    inner = network()
    model, optimizer = fabric.setup(inner, arsam_of(inner))
    arsam: Any = optimizer if how == "perturb of the wrapper" else optimizer.optimizer
    for inputs, labels in EXAMPLE["loader"]():

        def backward(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            fabric.backward(loss)
            return loss

        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward()

        if how == "closure":
            optimizer.step(closure)
            continue
        optimizer.zero_grad()
        backward()
        if arsam.due:
            with arsam.perturb():
                backward()
        optimizer.step()
    other, plain = by_hand(precision)
    for (name, x), y in zip(inner.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert counts(optimizer.optimizer) == counts(plain) and counts(plain)["ascents"] == 6
