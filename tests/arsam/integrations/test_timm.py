"""The example loop of timm's parts against a plainer loop."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

pytest.importorskip("timm", reason="timm is not installed; pip install '.[tasks]'")
from timm.utils import NativeScaler

from tests.reference import counts

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "timm_loop.py"))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 2.0**10)])
def test_equals_the_plain_loop(dtype: torch.dtype, scale: float) -> None:
    """Kills: a second pass on every step or none, statistics that move, clipping of scaled gradients or of g alone."""
    model = EXAMPLE["network"]()
    calls: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module))
    optimizer = EXAMPLE["optimizer_for"](model, clip=0.1)
    average = EXAMPLE["train"](model, optimizer, GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0), dtype, epochs=1)

    other = EXAMPLE["network"]()
    plain = EXAMPLE["optimizer_for"](other, clip=0.1)
    rates = [g["lr"] for g in optimizer.param_groups]
    for inputs, labels in EXAMPLE["batches"]():

        def backward() -> None:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = nn.functional.cross_entropy(other(inputs), labels)
            loss.backward()

        # the schedule of the example: linear from 0 over 3 steps, then a cosine over the 10 of the run
        step = plain.stats["steps"]
        for group in plain.param_groups:
            group["lr"] = 0.05 * (step / 3 if step < 3 else (1 + torch.cos(torch.tensor(torch.pi * step / 10))).item() / 2)
        plain.zero_grad()
        backward()
        if plain.due:
            with plain.perturb():
                backward()
        plain.step()
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5, msg=name)
    assert counts(optimizer) == counts(plain) and optimizer.stats["steps"] == 10
    assert len(calls) == 10 + optimizer.stats["ascents"] == 12
    assert len(set(rates)) == 1 and rates[0] < 0.05
    assert any(not torch.equal(x, y) for x, y in zip(average.module.parameters(), model.parameters(), strict=True))


def test_timms_own_scaler_is_refused() -> None:
    """The broken variant: backward and step in one call leave no place for the second pass; an error, not a plain step."""
    model = EXAMPLE["network"]()
    optimizer = EXAMPLE["optimizer_for"](model)
    inputs, labels = EXAMPLE["batches"]()[0]
    scaler = NativeScaler(device="cpu")
    with pytest.raises(RuntimeError, match="an ascent is due"):
        scaler(nn.functional.cross_entropy(model(inputs), labels), optimizer)
    scaler = NativeScaler(device="cpu")
    scaler(nn.functional.cross_entropy(model(inputs), labels), optimizer, need_update=False)
    with pytest.raises(RuntimeError, match="an ascent is due"), optimizer.perturb():
        scaler(nn.functional.cross_entropy(model(inputs), labels), optimizer)


def test_clipping_matters() -> None:
    """Kills: a clip that the example takes and drops."""
    weights = []
    for clip in (None, 1e-3):
        model = EXAMPLE["network"]()
        EXAMPLE["train"](
            model, EXAMPLE["optimizer_for"](model, clip), GradScaler("cpu", enabled=False), torch.float32, epochs=1
        )
        weights.append([p.detach().clone() for p in model.parameters()])
    assert any(not torch.equal(x, y) for x, y in zip(*weights, strict=True))


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: an example that does not run as it stands."""
    EXAMPLE["main"]()
    assert "'ascents': " in capsys.readouterr().out
