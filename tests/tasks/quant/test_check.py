"""A file that parts from its network is told, with the layer that does it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tasks.quant import export
from tasks.quant.calibrate import calibrate
from tasks.quant.check import check, layer_errors
from tasks.quant.prepare import prepare


def test_check(tmp_path: Path) -> None:
    """Silent on the network's own file; of another network's a warning that names its noisiest layer."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    float_model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)).eval()
    model = prepare(float_model, weight_bits=8, act_bits=8, layers={"2": (2, 8)})
    calibrate(model, [x])
    path = tmp_path / "model.onnx"
    export.export(model, path, [x.numpy()])
    same = check(path, model, [x[:16].numpy(), x[16:].numpy()])
    assert same["agreement"] > 0.9 and same["distance"] < 0.01 and not same["warnings"] and "layers" not in same
    with torch.no_grad():
        model[4].layer.weight.neg_()  # type: ignore[union-attr, operator, index]
    other = check(path, model, [x.numpy()])
    assert other["agreement"] < 0.5 and len(other["layers"]) == 3
    assert f"{path}: agrees" in other["warnings"][0] and "layer is 2 (" in other["warnings"][0]


def test_layer_errors() -> None:
    """6 dB a bit. Kills: the noise of all layers before it, a ratio upside down."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    rows = []
    for bits in (4, 8):
        model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), weight_bits=bits, act_bits=bits, first_last_bits=None)
        calibrate(model, [x])
        rows += layer_errors(model, x)
    assert [row["weight_bits"] for row in rows] == [4, 8]
    assert 18 < rows[1]["snr_db"] - rows[0]["snr_db"] < 30
    assert rows[0]["signed"] and rows[0]["layer"] == "0"
