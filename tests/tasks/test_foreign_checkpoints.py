"""Weights out of the files that other trainers write, read without running what else is in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tasks import checkpoint
from tasks.errors import UserError


def network() -> nn.Sequential:
    """Two layers and a BatchNorm, so that order and leaf names matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


STATE = network().state_dict()
OTHER = {name: value + 1 for name, value in STATE.items()}


def named(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    """With a prefix."""
    return {prefix + name: value for name, value in state.items()}


FILES: dict[str, dict[str, Any]] = {
    "timm": {"arch": "x", "state_dict": OTHER, "state_dict_ema": STATE, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "torchvision": {"model": OTHER, "model_ema": {"n_averaged": torch.ones(()), **named("module.")}, "optimizer": {}},
    "ddp": {"state_dict": named("module.")},
    "compile": named("_orig_mod."),
    "ddp of compile": {"model": named("module._orig_mod.")},
    "lightning": {"state_dict": {**named("model."), "loss.weight": torch.ones(2)}, "hyper_parameters": {"lr": 1.0}},
    "a key of its own": {"net": STATE, "optimizer": {"state": {}, "step": torch.ones(())}, "acc": 0.5},
    "another code's names": {f"layer{i}_{name.rpartition('.')[2]}.{name.rpartition('.')[2]}": v for i, (name, v) in
                             enumerate(STATE.items())},
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_trainers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gives the network's tensors. Kills: the last weights where averaged ones are there, a prefix that is not seen."""
    torch.save(FILES[kind], tmp_path / "file.pt")
    model = network()
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    checkpoint.load_weights(model, tmp_path / "file.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, STATE[name], msg=name)
    said = capsys.readouterr().err
    assert ("averaged" in said) == (kind in ("timm", "torchvision"))
    assert ("same order" in said) == (kind == "another code's names")


def test_safetensors(tmp_path: Path) -> None:
    """By the ending; a damaged one is named."""
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    model = network()
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    checkpoint.load_weights(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model[0].weight, STATE["0.weight"], check_dtype=True)  # type: ignore[arg-type]
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b\.safetensors: not a readable checkpoint"):
        checkpoint.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("change", ["order", "leaf", "lacking"])
def test_what_only_looks_alike(change: str, tmp_path: Path) -> None:
    """Kills: tensors taken by count, or by shape where gamma and beta have one; a prefix under which some are missing."""
    items = list(FILES["another code's names"].items())
    if change == "order":
        items[0], items[1] = items[1], items[0]
    elif change == "leaf":
        items[2], items[3] = items[3], items[2]
    state = dict(items) if change != "lacking" else dict(list(named("model.").items())[:-1])
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(UserError, match="does not fit the model"):
        checkpoint.load_weights(network(), tmp_path / "file.pt")
