"""What other run times say of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tasks.quant import report, runtime


def openvino(run: Any) -> SimpleNamespace:
    """As much of OpenVINO as is asked for."""
    core = SimpleNamespace(compile_model=lambda path, device: run)
    return SimpleNamespace(Core=lambda: core, __version__="1.0")


def test_a_second_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of equal answers, its error, or nothing. Kills: a report that stops for want of it, agreement of one batch."""
    images = torch.randn(100, 3)  # more than a batch
    file = nn.Identity()

    def mostly(x: Any) -> list[Any]:
        answer = x.copy()
        answer[:10, 0] += 100
        return [answer]

    def refuses(_: Any) -> list[Any]:
        raise RuntimeError("Unsupported\n type")

    monkeypatch.setitem(sys.modules, "openvino", None)
    assert runtime.in_openvino(Path("x"), file, images) is None
    monkeypatch.setitem(sys.modules, "openvino", openvino(mostly))
    opinion = runtime.in_openvino(Path("x"), file, images)
    changed = sum(int(batch[:10].argmax(1).ne(0).sum()) for batch in images.split(64))
    assert opinion == {"version": "1.0", "agreement": pytest.approx(1 - changed / 100)}
    assert changed > 0
    monkeypatch.setitem(sys.modules, "openvino", openvino(refuses))
    assert runtime.in_openvino(Path("x"), file, images) == {"version": "1.0", "error": "Unsupported type"}
    assert report._second(None) == []
    assert "0.9" in report._second({"version": "1.0", "agreement": 0.9})[0]
    assert "Unsupported" in report._second({"version": "1.0", "error": "Unsupported type"})[0]
