"""The ONNX file: the codes that it holds, the kernels that it runs on, and how near it comes to the fake-quantized model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tasks.quant import export
from tasks.quant.calibrate import calibrate
from tasks.quant.canonicalise import canonicalise
from tasks.quant.prepare import QuantLayer, prepare
from tasks.quant.runtime import INPUT, kernels, session
from tasks.quant.targets import TARGETS
from tests.tasks.quant.test_prepare import FAMILIES, family


class Residual(nn.Module):
    """Stem, pooling, a residual block with a projection, ReLU6, and a classifier."""

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.short = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.weight.data[0] *= gamma

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 5]."""
        x = self.stem(x)
        x = (self.second(self.first(x)) + self.short(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def _exporter_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def exported(tmp_path: Path, bits: int, gamma: float = 1.0, **settings: Any) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    model = prepare(Residual(gamma).eval(), weight_bits=bits, act_bits=bits, first_last_bits=None, **settings)
    calibrate(model, [images])
    path = tmp_path / "model.onnx"
    export.export(model, path, [images.numpy()])
    return model, images, path


def outputs(path: Path, images: Tensor) -> np.ndarray:
    return session(path).run(None, {INPUT: images.numpy()})[0]


def answers(model: nn.Module, images: Tensor, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Calibrate and export a prepared model: what the file answers, and what the model does."""
    calibrate(model, [images])
    export.export(model, path, [images.numpy()])
    with torch.no_grad():
        return outputs(path, images), model(images).numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_round_trip(bits: int, asymmetric: bool, tmp_path: Path) -> None:
    """The file answers as the fake-quantized model does. Kills: codes moved, a wrong zero point, BN absorbed into the codes."""
    model, images, path = exported(tmp_path, bits, asymmetric=asymmetric)
    with torch.no_grad():
        fake = model(images).numpy()
    low = outputs(path, images)
    error = np.abs(low - fake).mean() / np.abs(fake).mean()
    # Only the 8-bit edges and the rounded bias differ; a code that crosses a boundary weighs more at few bits.
    assert error < {2: 0.35, 3: 0.2, 4: 0.1, 8: 0.02}[bits], error
    assert outputs(path, images[:1]).shape == (1, 5), "the batch size is free"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_file_holds_the_codes_packed(bits: int, tmp_path: Path) -> None:
    """Bit for bit the quantizers' codes, in their width. Kills: packing that clips or reorders."""
    model, _, path = exported(tmp_path, bits)
    stored = {i.name: i for i in onnx.load(path).graph.initializer}
    names = [name for name, m in model.named_modules() if isinstance(m, QuantLayer)]
    assert len(names) == 5
    for name in names:
        layer = model.get_submodule(name)
        key = f"{name}.weight_quantizer.codes" + (".packed" if bits <= 4 else "")
        tensor = stored[key]
        assert tensor.data_type == {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[bits]
        codes = layer.weight_quantizer.codes(layer.layer.weight).numpy()  # type: ignore[union-attr, operator]
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_kernels(bits: int, tmp_path: Path) -> None:
    """All of it runs on integers.

    Kills: edges left float, ReLU6 kept in front of the codes, a classifier that its bias or zero points leave in float,
    pooling between codes of two kinds.
    """
    _, _, path = exported(tmp_path, bits)
    counts = kernels(path)
    assert counts["QLinearConv"] == 4
    assert counts["QLinearAdd"] == counts["QLinearGlobalAveragePool"] == counts["QGemm"] == 1
    assert not any(counts[k] for k in ("Conv", "FusedConv", "BatchNormalization", "Gemm", "ReduceMean", "MaxPool"))
    assert bits == 4 or counts["QuantizeLinear"] == 1, "of the image"


@pytest.mark.parametrize("target", list(TARGETS))
def test_targets(target: str, tmp_path: Path) -> None:
    """Answers as the network does, in codes that the run time takes. Kills: a sign, a zero point, an edge of another target."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16)
    model = prepare(Residual().eval(), weight_bits=4, act_bits=4)
    TARGETS[target].prepare(model)
    calibrate(model, [images])
    path = tmp_path / "model.onnx"
    export.export(model, path, [images.numpy()], target=target)
    with torch.no_grad():
        fake = model(images).numpy()
    assert np.abs(outputs(path, images) - fake).mean() < 0.1 * np.abs(fake).mean()
    graph = onnx.load(path).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            held[node.output[0]] = node.attribute[0].t
    after = {name: node.op_type for node in graph.node for name in node.input}
    kinds = {tensor.data_type for tensor in held.values()}
    assert (onnx.TensorProto.INT4 in kinds) == (target in ("ort", "ort-avx2"))
    codes = [
        onnx.numpy_helper.to_array(t).astype(int) for t in held.values() if t.data_type == onnx.TensorProto.INT8 and t.dims
    ]
    assert max(int(np.abs(c).max()) for c in codes) == {"ort-avx2": 64}.get(target, 128)
    shifts = [int(onnx.numpy_helper.to_array(t)) for name, t in held.items() if name.endswith(".shift")]
    assert set(shifts) == {"ort": {4}, "ort-avx2": {3}}.get(target, set())
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            zero = onnx.numpy_helper.to_array(held[node.input[2]])
            assert zero.dtype == (np.int8 if target == "tensorrt" else np.uint8)
            assert target != "tensorrt" or zero == 0
            assert target.startswith("ort") or after[node.output[0]] == "DequantizeLinear"


def test_tensorrt_takes_no_offset() -> None:
    """Kills: zero points that the run time refuses."""
    model = prepare(Residual().eval(), weight_bits=8, act_bits=8, asymmetric=True)
    with pytest.raises(ValueError, match="zero point 0"):
        TARGETS["tensorrt"].prepare(model)


def test_a_sum_that_goes_on_in_float_keeps_its_digits(tmp_path: Path) -> None:
    """A transformer's residuals. Kills: an 8-bit pair behind every addition."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16), nn.Linear(15, 5)
            self.block.bias.data[0] = 100.0  # an outlier, as transformers have

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT
            return self.head((x + self.block(x))[..., 1:].tanh().mean(1))

    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    model = prepare(Transformer().eval(), weight_bits=8, act_bits=8)
    file, fake = answers(model, images, tmp_path / "model.onnx")
    spread = np.abs(fake - fake.mean(0)).mean()
    assert np.abs(file - fake).mean() < 0.1 * spread


def test_negative_gamma(tmp_path: Path) -> None:
    """A channel whose gamma training turned negative: its codes change sign, or BatchNorm stays."""
    model, images, path = exported(tmp_path, 8, gamma=-1.0)
    with torch.no_grad():
        fake = model(images).numpy()
    assert np.abs(outputs(path, images) - fake).mean() / np.abs(fake).mean() < 0.02


def test_channels_that_are_switched_off(tmp_path: Path) -> None:
    """Gamma near 0, beta not. Kills: a bias cut off to 32 bits of a unit too small for it, which ONNX Runtime does quietly."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    float_model = Residual().eval()
    for name, norm in float_model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data[::2] = 1e-10 if "stem" in name else 0.0
            norm.bias.data += 0.5
    model = prepare(float_model, weight_bits=8, act_bits=8)
    file, fake = answers(model, images, tmp_path / "model.onnx")
    assert np.abs(file - fake).mean() / np.abs(fake).mean() < 0.02


def test_channels_whose_input_is_dead(tmp_path: Path) -> None:
    """As in MobileNets: sigma is next to nothing. Kills: units so coarse that the bias is rounded away."""

    def normalised(conv: nn.Conv2d) -> list[nn.Module]:
        return [conv, nn.BatchNorm2d(8), nn.ReLU6()]

    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    layers = normalised(nn.Conv2d(3, 8, 3, bias=False)) + normalised(nn.Conv2d(8, 8, 3, groups=8, bias=False))
    float_model = nn.Sequential(*layers, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 144, 5))
    float_model(images)  # running statistics, of channels that live
    first: Any = float_model[1]
    second: Any = float_model[4]
    first.bias.data[:4] = -50.0
    second.running_mean[:4], second.running_var[:4] = 0.0, 0.0
    second.bias.data[:4] = torch.tensor([0.3, 0.7, 1.5, 3.0])
    model = prepare(float_model.eval(), weight_bits=4, act_bits=4)
    file, fake = answers(model, images, tmp_path / "model.onnx")
    assert np.abs(file - fake).mean() / np.abs(fake).mean() < 0.15


def test_float_export(tmp_path: Path) -> None:
    """A float model goes the same way, without a quantizer in it."""
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(4, 3, 16, 16)
    export.export(model, tmp_path / "float.onnx", [images.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(outputs(tmp_path / "float.onnx", images), model(images).numpy(), atol=1e-5)


def test_not_calibrated(tmp_path: Path) -> None:
    """The error names the layer."""
    model = prepare(Residual(), weight_bits=4, act_bits=4)
    with pytest.raises(ValueError, match=r"stem\.0: a quantizer has no step size"):
        export.export(model, tmp_path / "x.onnx", [np.zeros((1, 3, 16, 16), np.float32)])


def test_a_layer_that_is_never_called(tmp_path: Path) -> None:
    """A model that reads a layer's weight itself: float in the file too. Kills: an export that wants all layers calibrated."""

    class Reads(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = (self.second(self.first(self.stem(x))) + self.short(self.stem(x))).relu().mean((2, 3))
            return torch.nn.functional.linear(x, self.head.weight, self.head.bias)

    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    model = prepare(Reads().eval(), weight_bits=8, act_bits=8)
    file, fake = answers(model, images, tmp_path / "model.onnx")
    assert np.abs(file - fake).mean() / np.abs(fake).mean() < 0.02
    stored = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not any(name.startswith("head") and "codes" in name for name in stored)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    """Every family becomes a file that ONNX Runtime runs, about as near to the model as that is to float.

    Kills: an operator that it lacks, an edge that costs more than 8 bits do.
    """
    model, size = family(name)
    images = torch.randn(8, 3, size, size)
    low = prepare(canonicalise(model.eval(), images[:1]), weight_bits=8, act_bits=8)
    with torch.no_grad():
        calibrate(low, [images])
        exact, fake = (out if isinstance(out, Tensor) else sum(out) / len(out) for out in (model(images), low.eval()(images)))
    export.export(low, tmp_path / "model.onnx", [images.numpy()])
    error = np.abs(outputs(tmp_path / "model.onnx", images) - fake.numpy()).max()
    assert error < 0.02 * float(exact.abs().max()) + 3 * float((fake - exact).abs().max())
