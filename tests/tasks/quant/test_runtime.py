"""Files in run times: their answers compared, their costs, and what the report says of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks.quant import export, report, runtime
from tasks.quant.calibrate import calibrate
from tasks.quant.prepare import prepare

CPU = torch.device("cpu")


def openvino(run: Any) -> SimpleNamespace:
    """As much of OpenVINO as is asked for."""
    core = SimpleNamespace(compile_model=lambda path, device: run)
    return SimpleNamespace(Core=lambda: core, __version__="1.0")


class Turned(nn.Module):
    """Another answer for the first ten of each batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:10, 0] += 100
        return x


def test_agreement_and_a_second_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of equal answers over all batches; its error, or nothing. Kills: agreement of one batch, a pass per opinion."""
    torch.manual_seed(0)
    images = torch.randn(100, 3)
    changed = sum(int(batch[:10].argmax(1).ne(0).sum()) for batch in images.split(64))
    assert changed > 0

    def asked(run: Any) -> runtime.Compared:
        monkeypatch.setitem(sys.modules, "openvino", run if run is None else openvino(run))
        compared = runtime.Compared(nn.Identity(), Turned(), CPU, Path("x"))
        for batch in images.split(64):
            assert compared(batch) is batch, "the file's answers count"
        return compared

    def refuses(_: Any) -> list[Any]:
        raise RuntimeError("Unsupported\n type")

    compared = asked(None)
    assert compared.agreement == pytest.approx(1 - changed / 100)
    assert compared.second_opinion is None
    assert asked(lambda x: [Turned()(torch.from_numpy(x)).numpy()]).second_opinion == {
        "version": "1.0",
        "agreement": pytest.approx(1 - changed / 100),
    }
    assert asked(refuses).second_opinion == {"version": "1.0", "error": "Unsupported type"}
    assert report._second(None) == []
    assert "0.9" in report._second({"version": "1.0", "agreement": 0.9})[0]
    assert "Unsupported" in report._second({"version": "1.0", "error": "Unsupported type"})[0]


def test_costs(tmp_path: Path) -> None:
    """Two calls and a process each. Kills: batch 8 timed at batch 1, memory of another file."""
    torch.manual_seed(0)
    image = np.zeros((1, 3, 16, 16), np.float32)
    files = {}
    for name, width in (("float", 4), ("low_bit", 1024)):
        model = nn.Sequential(nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2048))
        files[name] = tmp_path / f"{name}.onnx"
        export.export(model.eval(), files[name], [image])
    cost = runtime.costs(files, image, rounds=20)
    for figures in cost.values():
        assert set(figures) == {"latency_ms", "latency_ms_batch_8", "load_seconds", "resident_mb", "needed_mb"}
        assert figures["latency_ms_batch_8"] > figures["latency_ms"] > 0
    assert cost["low_bit"]["resident_mb"] > cost["float"]["resident_mb"] + 4, "8 MB of weights"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_few_bits_need_no_more_memory(tmp_path: Path) -> None:
    """Unpacked weights of 4 bits beside those of 8, 8 MB of codes, a process each. Kills: steps of unpacking that stay."""
    held = {}
    for bits in (8, 4):
        torch.manual_seed(0)
        wide = nn.Conv2d(960, 960, 3, bias=False)
        model = prepare(nn.Sequential(nn.Conv2d(3, 960, 1), wide, nn.Conv2d(960, 2, 1)), weight_bits=bits, act_bits=8)
        image = torch.randn(1, 3, 4, 4)
        calibrate(model, [image], method="minmax")
        path = tmp_path / f"{bits}.onnx"
        export.export(model, path, [image.numpy()])
        held[bits] = runtime.footprint(path, (3, 4, 4))["needed_mb"]
    assert held[8] > 8
    assert held[4] < held[8] + 6, held


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(3.0, 2.0, "1.50 times faster"), (3.0, 4.0, "1.33 times slower"), (1, 1, "1.00 times faster")],
)
def test_speed_in_words(before: float, after: float, words: str) -> None:
    """Kills: 0.75 times faster."""
    assert report.speed(before, after) == words
